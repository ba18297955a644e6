"""job=codistill: teacher and student train in turns; the cache is the only channel between them.

A round: the teacher trains and publishes, the student trains on what is published and its order allows. With late_first
it starts when the teacher is half-way, keeps pace, and comes back to the first half when the teacher is done.
Control arms follow, each a student run of its own in a folder below: same init, same samples, same number of steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from distill.config.schema import ArmConfig, CodistillConfig, ReplayConfig, RunConfig
from distill.run import build, student
from distill.run.overhead import capture_overhead
from distill.run.run import Run, as_job
from distill.run.trainer import Trainer
from distill.tracking import table
from student.distilling import StudentStep


@as_job
def codistill(run: Run) -> None:
    config = run.config
    teacher, capture = build.teacher(run)
    assert capture is not None
    readers = build.open_readers(run)
    learner = build.student(run, readers)
    assert isinstance(learner.program, StudentStep)
    trainers = {"teacher": teacher, "student": learner}
    run.restore(trainers)
    rounds = config.codistill.rounds
    # A run that was stopped within a student's turn goes on with it, on the view that the student had.
    turn = run.restored.state.get("turn", "teacher") if run.restored else "teacher"
    while teacher.at < teacher.steps or learner.at < learner.steps:
        if teacher.at < teacher.steps or turn == "student":
            if turn == "teacher":
                teacher.advance(_round_end(teacher, rounds))
                if teacher.stopped:
                    run.save(trainers)
                if teacher.at == teacher.steps:
                    capture.finish()
                else:
                    capture.flush()
                run.dist.barrier()  # every rank's shards are out before any rank looks
                for reader in readers:
                    reader.refresh()
            goal = student.ready(learner, readers, learner.steps)
            # Checkpoints stand between logged rows, so that no row is averaged over a part of its steps.
            goal -= goal % learner.config.log_every if goal < learner.steps else 0
            learner.advance(max(learner.at, min(goal, _round_end(learner, rounds))))
        else:
            learner.advance(_round_end(learner, rounds))
        turn = "teacher"
        run.save(trainers, **({"turn": "student"} if learner.stopped else {}))
    capture.close()

    taught = run.evaluate(teacher.engine.model, role="teacher")
    result = run.evaluate(learner.engine.model, teacher.engine.model, role="student")
    overhead = capture_overhead(run, teacher)
    for trainer in trainers.values():
        trainer.engine.close()
    figures = run.figures("teacher", taught) | run.figures("distilled", result)
    for name, arm in config.codistill.arms.items():
        found = _arm(run, name, arm)
        parts = ("loss", "accuracy", "corpora")
        figures |= {f"{name}_{part}": found[key] for part in parts if (key := f"student_{part}") in found}
    summary: dict[str, Any] = {
        "job": "codistill",
        **figures,
        **build.cache_figures(readers),
        "capture_overhead": overhead,
        "coverage": learner.program.coverage,
        "stall": learner.stalled / learner.seconds if learner.seconds else None,
        "agreement": result.agreement,
        "ece": result.ece,
    }
    if "hard" in config.codistill.arms:
        gap = figures["hard_loss"] - taught.loss
        summary["gap_closed"] = (figures["hard_loss"] - result.loss) / gap if gap else None
    summary["seconds"] = run.seconds
    run.tracker.message(table.render(summary))
    run.finish(summary)


def _round_end(trainer: Trainer, rounds: int) -> int:
    """The step at which the trainer's current round ends: a multiple of its logging interval, or its last step."""
    every = trainer.config.log_every
    length = max(every, trainer.steps // rounds // every * every)
    return min(trainer.steps, (trainer.at // length + 1) * length)


def _arm(run: Run, name: str, arm: ArmConfig) -> dict[str, Any]:
    """Trains one control arm, or finds it trained; the summary of its run."""
    sub = Run(arm_config(run, arm), run.folder / "arms" / name, run.dist, run.data)
    run.tracker.message(f"arm {name}")
    if not sub.finished:
        with sub:
            student.train(sub)
    return sub.summary()


def arm_config(run: Run, arm: ArmConfig) -> RunConfig:
    """A student's run on the codistilled cache, with the arm's own learning rate, order and weighting."""
    config = run.config
    part = config.student
    lr = part.optim.lr if arm.lr is None else arm.lr
    optim = dataclasses.replace(part.optim, lr=lr, schedule=arm.schedule or part.optim.schedule)
    own = dataclasses.replace(
        part, optim=optim, weighting=arm.weighting, cached=arm.cached, replay=ReplayConfig(order=arm.order)
    )
    return dataclasses.replace(
        config,
        job="student",
        student=own,
        codistill=CodistillConfig(),
        cache=dataclasses.replace(config.cache, dir=build.cache_root(run)),
        tracking=dataclasses.replace(config.tracking, report=False),
    )
