"""A run: its folder, its data, its records, and how it starts, resumes and ends.

Everything of a run lies in its folder: `config.yaml`, `data/`, `metrics.jsonl`, `checkpoints/`, `cache/`,
`report.html`, and `summary.json`, which marks the run as finished.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distill.config import json_text
from distill.config.errors import ConfigError, DataError, DivergenceError
from distill.config.files import write_text
from distill.config.load import to_dict
from distill.config.registry import JOBS
from distill.config.schema import RunConfig
from distill.data.prepare import Prepared, prepare
from distill.data.tokenizer import TOKENIZER
from distill.engine import checkpoint
from distill.engine.dist import Dist
from distill.run import folder as run_folder
from distill.run.chosen_precision import settled
from distill.run.identity import LINEAGES, Lineage
from distill.tracking import report
from distill.tracking.tracker import Tracker


class Run:
    """One run folder on all ranks; as a context, closes all that it has opened, whatever ends it.

    It is made in three steps, all collective: the constructor claims the folder, `prepare` makes or finds the data, and
    when everything has been checked `start` writes the configuration and opens the records. So a run that is refused
    leaves no records, and the corrected command starts in the same folder.

    Args:
        folder: created here; a folder that holds a run already needs resume=true.

    Attributes:
        finished: the folder holds a finished run; nothing is to be done.
        restored: the checkpoint to go on from, or None.
        lineages: of the teachers in training, by role; in every checkpoint.
    """

    def __init__(self, config: RunConfig, folder: Path, dist: Dist):
        self.config = config = settled(config, folder, dist)
        self.folder, self.dist = folder, dist
        self.began = time.perf_counter()
        self.summary_path = folder / run_folder.SUMMARY
        self.checkpoints = folder / run_folder.CHECKPOINTS
        self.resources = ExitStack()
        problems = dist.from_main(self._claim() if dist.is_main else None)
        if problems:
            raise ConfigError(*problems)
        self.finished: bool = dist.from_main(config.resume and self.summary_path.exists())
        self.restored = checkpoint.newest(self.checkpoints) if config.resume and not self.finished else None
        state: dict[str, Any] = self.restored.state if self.restored else {"seconds": 0.0}
        self.seconds_before: float = state["seconds"]
        self.saved = self.restored.step if self.restored else None
        """Step of the last checkpoint that this process has read or written."""
        self.lineages = {role: Lineage(**record) for role, record in state.get(LINEAGES, {}).items()}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.resources.__exit__(*error)

    def _claim(self) -> list[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            return [f"hydra.run.dir is {self.folder}; cannot write there: {error.strerror}"]
        return list(run_folder.problems(self.folder, self.config))

    def prepare(self, vocab_size: int) -> None:
        """Tokenizer and packed corpora, for models of this vocabulary."""
        data = self.config.data
        folder = Path(data.dir) if data.dir else self.folder / "data"
        prepared = None
        for turn in (True, False):  # the main rank packs, the others find it packed
            if self.dist.is_main is turn:
                prepared = prepare(data, folder, vocab_size)
            self.dist.barrier()
        assert prepared is not None
        self.use(prepared)

    def use(self, prepared: Prepared) -> None:
        """Takes data that are there already: those of the run that this one is an arm of.

        Raises:
            DataError: they are others than those that the run's checkpoint was trained on, whether or not a cache is
                read; a line for the tokenizer and for each part of a corpus that changed.
        """
        before = self.restored.state["data"] if self.restored is not None else {}
        wrong = [
            f"{key} has digest {digest}; the run in {self.folder} was started with {before[key]}: put back the files "
            "that it was made of, or start anew in another folder"
            for key, digest in prepared.digests.items()
            if before.get(key, digest) != digest
        ]
        if wrong:
            raise DataError("\n".join(wrong))
        self.data = prepared

    def start(self) -> None:
        """Writes the run's configuration and tokenizer, and opens its records."""
        config = self.config
        begun = self.dist.from_main((self.folder / run_folder.CONFIG).exists())
        if self.dist.is_main:
            checkpoint.clear_half_written(self.checkpoints)
            run_folder.record(self.folder, config)
            if self.data.train:  # job=export has no text
                self.data.tokenizer.save(self.folder / TOKENIZER)
        steps = {role: s["step"] for role, s in self.restored.state["roles"].items()} if self.restored else {}
        self.tracker = Tracker(
            self.folder,
            config.tracking,
            to_dict(config),
            enabled=self.dist.is_main,
            resume_steps=steps if config.resume else None,
        )
        self.resources.push(self.tracker)
        if begun and self.restored is None and self.roles and self.dist.is_main:
            self.tracker.message(f"{self.checkpoints} has no checkpoint: the run starts from its beginning")

    @property
    def roles(self) -> tuple[str, ...]:
        """Which models it trains."""
        return JOBS[self.config.job].trains

    @property
    def seconds(self) -> float:
        """Wall time of this run, earlier parts of a resumed one included."""
        return self.seconds_before + time.perf_counter() - self.began

    def diverged(self, role: str, problem: str) -> DivergenceError:
        """The error that ends the training of a role; problem: what was not finite, and when."""
        arm, rate = "", f"{role}.optim.lr"
        if self.folder.parent.name == "arms":
            arm, rate = f" of arm {self.folder.name}", f"codistill.arms.{self.folder.name}.lr"
        optim, last = getattr(self.config, role).optim, checkpoint.last(self.checkpoints)
        again = f"with a lower {rate} (now {optim.lr:g}) or {role}.optim.clip (now {optim.clip:g})"
        way_out = f"; no checkpoint was saved before: start another run {again}"
        if last is not None:
            way_out = (
                f"; the last good checkpoint is {last}: resume=true goes on from it, and if the run diverges again, "
                f"start another from there ({role}.init_from) {again}"
            )
        return DivergenceError(f"{role}{arm}: {problem}{way_out}")

    def summary(self) -> dict[str, Any]:
        """What a finished run wrote, on every rank."""
        summary: dict[str, Any] = self.dist.from_main(run_folder.summary(self.folder) if self.dist.is_main else None)
        return summary

    def finish(self, entries: dict[str, Any]) -> None:
        """Ends the run: `summary.json`, then the report."""
        self.tracker.close()
        if self.dist.is_main:
            summary = {"job": self.config.job, **entries, "seconds": self.seconds}
            write_text(self.summary_path, json_text.dumps(summary, indent=1) + "\n")
            if self.config.tracking.report:
                self.tracker.message(f"report: {report.write(self.folder)}")
        self.dist.barrier()


def as_job(body: Callable[[Run], None]) -> Callable[[RunConfig, Path, Dist], None]:
    """The function of a job (`distill.config.registry`) that takes place in one run folder."""

    @functools.wraps(body)
    def job(config: RunConfig, folder: Path, dist: Dist) -> None:
        run = Run(config, folder, dist)
        if run.finished:
            if dist.is_main:
                print(f"{folder}: finished; nothing to resume")
            return
        with run:
            body(run)

    return job
