"""job=codistill: teacher and student train in turns; the cache is the only channel between them.

A round: the teacher trains and publishes, the student trains on what is published and its order allows. With late_first
it starts when the teacher is half-way, keeps pace, and reads the first half when the teacher is done.
Control arms follow, each a student run of its own in a folder below: same init, same samples, same number of steps.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from distill.cache import CacheReader
from distill.config.schema import ArmConfig, CodistillConfig, ReplayConfig, RunConfig, Targets
from distill.run import build
from distill.run.caches import cache_entries, cache_root, open_readers
from distill.run.evaluation import evaluate_whole, model_entries
from distill.run.live import learning
from distill.run.overhead import capture_overhead
from distill.run.run import Run, as_job
from distill.run.student import train_student
from distill.run.trainer import Leg, Trainer, train
from distill.tracking import table


@as_job
def codistill(run: Run) -> None:
    config = run.config
    build.prepare(run)
    teacher, capture = build.teacher(run)
    readers = open_readers(run) if capture else []
    is_live = config.student.targets is Targets.live
    student, recipe = build.student(run, None if is_live else readers, learning(teacher) if is_live else None)
    trainers = {"teacher": teacher, "student": student}
    train(run, trainers, lambda stopped: _rounds(run, teacher, student, readers, stopped))
    if capture:
        capture.close()

    taught = evaluate_whole(run, teacher.engine.model, role="teacher")
    result = evaluate_whole(run, student.engine.model, teacher.engine.model, role="student")
    captured: dict[str, Any] = {}
    if capture:
        captured = cache_entries(readers) | {"capture_overhead": capture_overhead(run, teacher)}
    for trainer in trainers.values():
        trainer.engine.close()
    entries = model_entries(run, "teacher", taught) | model_entries(run, "distilled", result)
    for name, arm in config.codistill.arms.items():
        summary = _arm(run, name, arm)
        parts = ("loss", "accuracy", "corpora")
        entries |= {f"{name}_{part}": summary[key] for part in parts if (key := f"student_{part}") in summary}
    entries |= {
        **captured,
        "coverage": recipe.coverage,
        "stall": student.clock.stall,
        "agreement": result.agreement,
        "ece": result.ece,
    }
    [share] = [row.gap_closed for row in table.outcomes(entries) if row.arm == "distilled"]
    entries |= {} if share is None else {"gap_closed": share}
    run.tracker.message(table.render(entries | {"seconds": run.seconds}))
    run.finish(entries)


def _rounds(
    run: Run, teacher: Trainer, student: Trainer, readers: list[CacheReader], stopped: str | None
) -> Iterator[Leg]:
    """Turns of teacher and student; a run that was stopped within a student's turn goes on with it, on the view of the
    cache that the student had."""
    rounds = run.config.codistill.rounds
    while teacher.step < teacher.steps or student.step < student.steps:
        goal = _round_end(student, rounds)
        if teacher.step < teacher.steps or stopped == "student":
            if stopped != "student":
                yield Leg(teacher, _round_end(teacher, rounds), save=False)
                run.dist.barrier()  # all shards are published before any rank reads
                for reader in readers:
                    reader.refresh()
            if run.config.student.targets is Targets.live:
                batch = run.config.teacher.train.batch
                reach = student.feed.passed(teacher.step, batch, student.step, student.steps)
            else:
                reach = student.feed.published(readers, student.step, student.steps)
            # Checkpoints lie between logged rows, so that no row is averaged over a part of its steps.
            reach -= reach % student.config.log_every if reach < student.steps else 0
            goal = max(student.step, min(reach, goal))
        stopped = None
        yield Leg(student, goal)


def _round_end(trainer: Trainer, rounds: int) -> int:
    """The step at which the trainer's current round ends: a multiple of its logging interval, or its last step."""
    every = trainer.config.log_every
    length = max(every, trainer.steps // rounds // every * every)
    return min(trainer.steps, (trainer.step // length + 1) * length)


def _arm(run: Run, name: str, arm: ArmConfig) -> dict[str, Any]:
    """Trains one control arm, or finds it trained; the summary of its run."""
    below = Run(arm_config(run, arm), run.folder / "arms" / name, run.dist)
    run.tracker.message(f"arm {name}")
    if not below.finished:
        with below:
            below.use(run.data)
            train_student(below)
    return below.summary()


def arm_config(run: Run, arm: ArmConfig) -> RunConfig:
    """A student's run on the codistilled cache, with the arm's own learning rate, order and weighting."""
    config = run.config
    part = config.student
    lr = part.optim.lr if arm.lr is None else arm.lr
    optim = dataclasses.replace(part.optim, lr=lr, schedule=arm.schedule or part.optim.schedule)
    own = dataclasses.replace(
        part,
        optim=optim,
        weighting=arm.weighting,
        cached=arm.cached,
        targets=Targets.cache,
        hidden_match=0.0,
        replay=ReplayConfig(order=arm.order),
    )
    return dataclasses.replace(
        config,
        job="student",
        student=own,
        codistill=CodistillConfig(),
        cache=dataclasses.replace(config.cache, dir=cache_root(run)),
        tracking=dataclasses.replace(config.tracking, report=False),
    )
