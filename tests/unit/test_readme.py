"""README.md and docs: their length, and that the commands, links and files which they show exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from distill.config.load import resolve
from distill.config.registry import FACTORS, LOSSES
from distill.tools.commands import COMMANDS, Parser
from docs import draw_smoke

ROOT = Path(__file__).parents[2]
MOST_WORDS = 900
PAGES = ("README.md", "docs/guide.md", "docs/results.md", "docs/cache.md", "docs/python.md")
STARTS = {"codistill": ["codistill"], "torchrun": ["-m", "distill"], "deepspeed": ["--module", "distill"]}
"""Programs that take overrides, and the words in front of these."""
FOLDERS = ("PACKED", "RUN", "RUN/cache", "FOLDER", "DIR", "corpus")
"""Names in commands that stand for a user's folders."""
EXPERIMENT = """\
# @package _global_
data:
  corpora:
    main: {source: stdlib}
    extra: {source: stdlib}
"""


def blocks(page: str) -> list[str]:
    """Lines of indented code, with those that a backslash continues as one."""
    code = re.findall(r"(?:^ {4}.*\n)+", page, re.MULTILINE)
    return [line.strip() for block in code for line in block.replace("\\\n", " ").splitlines()]


def spans(page: str) -> list[str]:
    """Inline code."""
    text = re.sub(r"(?:^ {4}.*\n)+", "", page, flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(*programs: str) -> list[str]:
    lines = [line for name in PAGES for page in [(ROOT / name).read_text()] for line in blocks(page) + spans(page)]
    return [line for line in dict.fromkeys(lines) if line.split()[0] in programs and len(line.split()) > 1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder that has what the commands refer to."""
    for name in FOLDERS:
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "a"}\n')
    for place in ("tokenizer.json", "RUN/tokenizer.json"):
        (tmp_path / place).write_text("{}")
    (tmp_path / "DIR" / "experiment").mkdir()
    (tmp_path / "DIR" / "experiment" / "MINE.yaml").write_text(EXPERIMENT)
    source = (ROOT / "docs" / "guide.md").read_text()
    [module] = re.findall(r"`my_parts\.py`.*?:\n\n((?: {4}.*\n|\n)+)", source)
    (tmp_path / "my_parts.py").write_text(re.sub(r"^ {4}", "", module, flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (FACTORS, LOSSES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return tmp_path


def test_the_readme_is_short():
    words = (ROOT / "README.md").read_text().split()
    assert len(words) <= MOST_WORDS, len(words)


@pytest.mark.parametrize("line", commands(*STARTS))
def test_runs_resolve(line, home):
    words = shlex.split(line, comments=True)
    if words[1] == "--version":
        return
    start = STARTS[words[0]]
    [first] = [i for i in range(len(words)) if words[i : i + len(start)] == start]
    overrides = words[first + len(start) :]
    folders = [word.partition("=")[2] for word in overrides if word.startswith("--config-dir=")]
    resolve([word for word in overrides if not word.startswith("--")], *folders)


@pytest.mark.parametrize("line", commands("codistill-cache"))
def test_commands_of_the_tools_parse(line):
    name, *arguments = shlex.split(line, comments=True)[1:]
    if name in ("--version", "COMMAND"):
        return
    parser = Parser(prog=name)
    COMMANDS[name].load().add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize("line", commands("make"))
def test_targets_of_make_exist(line):
    for word in shlex.split(line, comments=True)[1:]:
        target = "=" in word or re.search(rf"^{re.escape(word)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert target, f"{line}: {word}"
    for name in re.findall(r"ONLY=(\w+)", line):
        assert any((ROOT / "tests" / "bench" / each).is_file() for each in (f"{name}.py", f"{name}/__init__.py")), line


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.is_file(), target
        assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    folders = "conf|losses|teacher|student|distill|examples|tests|docs"
    for span in spans((ROOT / name).read_text()):
        if re.fullmatch(rf"(?:{folders})(?:/[\w.-]+)+/?|[A-Z]+\.md|[\w-]+\.(?:toml|txt)", span):
            assert (ROOT / span).exists(), span


def anchors(page: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_chart_is_drawn_from_the_table():
    runs = draw_smoke.runs((ROOT / "docs" / "results.md").read_text())
    assert (ROOT / "docs" / "smoke.svg").read_text() == draw_smoke.svg(runs)
    readme = (ROOT / "README.md").read_text()
    for run in runs:
        row = [
            f"{run['seed']}, {run['machine']}",
            run["teacher"],
            run["hard"],
            run["constant"],
            run["step"],
            run["distilled"],
        ]
        assert f"| {' | '.join(row)} | {run['closed by distilled']} | {run['bytes/token']} |" in readme, run
