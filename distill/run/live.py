"""The teachers of live targets: a frozen one, loaded from a folder, or the one that trains in the same run."""

from distill.config import soft_losses
from distill.config.errors import ConfigError
from distill.run import build
from distill.run.frozen import load_teacher
from distill.run.run import Run
from distill.run.trainer import Trainer
from student.live_teacher import LiveTeacher
from teacher.labelling import own_hidden


def frozen(run: Run) -> LiveTeacher:
    """The teacher of `teacher.from`; prepares the run's data for it and for the student. Collective.

    Raises:
        ConfigError: as `load_teacher`, or its vocabulary is not for the student's loss.
    """
    teacher = load_teacher(run, lambda vocab_size: _prepare(run, vocab_size))
    model, steps = teacher.model, teacher.steps
    return LiveTeacher(
        model.hidden, lambda: model.unembedding, model.unembedding.shape[1], lambda: steps, teacher.identity
    )


def _prepare(run: Run, vocab_size: int) -> None:
    name = f"the teacher of teacher.from={run.config.teacher.from_}"
    if problem := soft_losses.vocabulary_problem(run.config.student, vocab_size, name):
        raise ConfigError(problem)
    build.prepare(run, vocab_size)


def learning(teacher: Trainer) -> LiveTeacher:
    """The teacher of a run that trains both, at its weights of the moment."""
    model = teacher.engine.model
    return LiveTeacher(
        lambda batch: own_hidden(model, batch),
        lambda: model.head.weight.detach(),
        model.config.hidden_size,
        lambda: teacher.step,
    )
