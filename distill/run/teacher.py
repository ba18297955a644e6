"""job=teacher: pretrain a teacher, and capture its soft targets on the way."""

from __future__ import annotations

from typing import Any

from distill.run import build, length
from distill.run.overhead import capture_overhead
from distill.run.run import Run, as_job


@as_job
def teacher(run: Run) -> None:
    trainer, capture = build.teacher(run)
    run.restore({"teacher": trainer})
    every = run.config.teacher.train.checkpoint_every or trainer.steps
    while trainer.at < trainer.steps:
        trainer.advance(min(trainer.steps, (trainer.at // every + 1) * every))
        if capture and not trainer.stopped:
            # Published before the checkpoint: what a resumed run takes as done is on disk.
            capture.flush()
        run.save({"teacher": trainer})
    result = run.evaluate(trainer.engine.model, role="teacher")
    summary: dict[str, Any] = {"job": "teacher", **run.figures("teacher", result), "steps": trainer.steps}
    summary["tokens"] = trainer.steps * run.config.teacher.train.batch * run.config.data.sample_tokens
    summary |= length.figures(run, trainer.engine.model, result)
    if capture:
        capture.finish()
        capture.close()
        summary |= build.cache_figures(build.open_readers(run, "teacher"))
        summary["capture_overhead"] = capture_overhead(run, trainer)
    trainer.engine.close()
    run.finish({**summary, "seconds": run.seconds})
