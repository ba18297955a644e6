"""What the lab measured: one JSON line a student in a file that is committed.

A line has two digests. `config` is over the student's resolved configuration and, where it reads a cache, those of its
teachers, without what is switched off or changes no result. `sources` is over the program's files that decide the
result, as syntax trees: comments, docstrings and layout do not count. Of a student without a cache neither the files
nor the keys of weighting, teachers and caches count.

A key that is added later takes no part where its value is what the program did before it; else no line that is
committed would be found again.
"""

import ast
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from distill.config import json_text
from distill.config.files import write_all
from distill.config.schema import RunConfig, Source
from distill.config.study import LabArm, LabTargets
from distill.run.chosen_precision import decisive
from distill.run.identity import digest_of

ROOT = Path(__file__).resolve().parents[2]
_TRAINING = (
    "losses/*.py", "distill/data/*.py", "distill/model/*.py", "distill/engine/*.py",
    *(f"distill/run/{name}.py" for name in ("build", "feed", "models", "trainer")),
)  # fmt: skip
_STUDENT = ("student/*.py", "distill/run/lab_student.py")
_TEACHER = (
    "teacher/*.py", "distill/cache/**/*.py", "distill/run/backfill*.py", "distill/run/caches.py",
    "distill/run/lab_caches.py", "distill/tools/merge.py", "distill/tools/repack.py",
)  # fmt: skip
SOURCES = {
    "labels": (*_TRAINING, *_STUDENT),
    "cached": (*_TRAINING, *_STUDENT, *_TEACHER),
    "teachers": (*_TRAINING, *_TEACHER),
}
"""Files that decide what a student on labels alone, a student with a cache, and the teachers of a regime come to."""
_OF_WEIGHTS = ("weighting.py", "factors.py", "shard_lag.py")
"""Which decide the result of a student with a cache alone."""

_NO_RESULT = (
    "log_every", "eval_every", "eval_samples", "checkpoint_every", "keep_checkpoints",
    "accumulation", "activation_checkpointing", "head_chunk",
)  # fmt: skip
"""Keys of `train`: what is seen and kept, and how the work is cut, which changes the rounding alone."""

Line = dict[str, Any]


def config_digest(
    student: RunConfig, teachers: Sequence[RunConfig], untils: Sequence[float], arm: LabArm, targets: LabTargets
) -> str:
    """Sixteen hex digits over all of a configuration that decides a student's result.

    Args:
        untils: the share of its steps after which each teacher ends.
    """
    parts: dict[str, Any] = {"student": _student(student)}
    if student.student.cached:
        parts["teachers"] = teachers_digest(teachers, untils)
        parts |= {"targets": targets.value, "shuffled": arm.shuffled, "reversed": arm.reversed}
    if any(corpus.source is Source.stdlib for corpus in student.data.corpora.values()):
        parts["text"] = sys.version.split()[0]
    return digest_of(parts)


def teachers_digest(teachers: Sequence[RunConfig], untils: Sequence[float]) -> str:
    """The same of a regime's teachers; it names the folder of their caches."""
    return digest_of([[_teacher(teacher), until] for teacher, until in zip(teachers, untils)])


def _common(config: RunConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    del plain["data"]["dir"]
    for role in ("teacher", "student"):
        for key in _NO_RESULT:
            del plain[role]["train"][key]
    for corpus in plain["data"]["corpora"].values():
        for source in (Source.law, Source.needle):
            if corpus["source"] is not source:
                del corpus[source.value]
    common = {key: plain[key] for key in ("seed", "data", "plugins")} | {"precision": decisive(config.precision)}
    return common | {"plain": plain}


def _student(config: RunConfig) -> dict[str, Any]:
    common = _common(config)
    plain = common.pop("plain")
    student, cached = plain["student"], config.student.cached
    weighting = student.pop("weighting")
    if cached:
        student["weighting"] = {
            key: value for key, value in weighting.items() if not isinstance(value, dict) or value.get("enabled", value)
        }
    return common | {"student": student, "evaluate": plain["evaluate"]}


def _teacher(config: RunConfig) -> dict[str, Any]:
    common = _common(config)
    plain = common.pop("plain")
    cache = {key: plain["cache"][key] for key in ("codec", "shard_samples")}
    return common | {"teacher": plain["teacher"], "cache": cache}


@functools.cache
def sources_digest(kind: str) -> str:
    """Sixteen hex digits over the files of a kind of `SOURCES`."""
    digest = xxhash.xxh3_64()
    for path in sorted({path for pattern in SOURCES[kind] for path in ROOT.glob(pattern)}):
        if kind == "cached" or path.name not in _OF_WEIGHTS:
            digest.update(f"{path.relative_to(ROOT)} {_meaning(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def _meaning(source: str) -> str:
    """The syntax tree of a source without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(part: ast.AST) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)


class Evidence:
    """The lines of one file, those that other processes append included.

    Attributes:
        unreadable: lines that are no JSON object; a process that was killed may leave one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.unreadable = 0
        self._read = 0
        self._lines: dict[str, list[Line]] = {}

    def refresh(self) -> None:
        """Reads the whole lines that were appended since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for text in whole.splitlines():
            line = _parsed(text)
            if line is not None:
                self._lines.setdefault(line["config"], []).append(line)
            elif text.strip():
                self.unreadable += 1

    def find(self, config: str, sources: str | None) -> Line | None:
        """The last line of a configuration; sources: None: whichever they were."""
        lines = self._lines.get(config, [])
        return next((line for line in reversed(lines) if sources in (None, line["sources"])), None)

    def __iter__(self) -> Iterator[Line]:
        for lines in self._lines.values():
            yield from lines

    def append(self, line: Line) -> None:
        """Adds a line, on disk when this returns; one write, so that processes do not mix theirs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            write_all(handle, ("\n" * torn + json_text.dumps(line) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"config", "sources", "loss"} <= line.keys() else None


def measure(line: Line) -> float:
    """What arms are compared by: the excess over known laws, else the held-out loss; nats."""
    return float(line["excess"] if "excess" in line else line["loss"])


def name_of(line: Line) -> str:
    return "excess" if "excess" in line else "loss"
