"""job=teacher: pretrain a teacher, and capture its soft targets on the way."""

from typing import Any

from distill.run import build
from distill.run.caches import cache_entries, open_readers
from distill.run.evaluation import evaluate_whole, length_entries, model_entries
from distill.run.overhead import capture_overhead
from distill.run.run import Run, as_job
from distill.run.trainer import to_checkpoints, train


@as_job
def teacher(run: Run) -> None:
    build.prepare(run)
    trainer, capture = build.teacher(run)
    train(run, {"teacher": trainer}, lambda _: to_checkpoints(trainer))
    model = trainer.engine.model
    result = evaluate_whole(run, model, role="teacher")
    entries: dict[str, Any] = model_entries(run, "teacher", result) | {"steps": trainer.steps}
    entries["tokens"] = trainer.steps * trainer.clock.tokens_per_step
    entries |= length_entries(run, model, result)
    if capture:
        capture.close()
        entries |= cache_entries(open_readers(run, "teacher"))
        entries["capture_overhead"] = capture_overhead(run, trainer)
    trainer.engine.close()
    run.finish(entries)
