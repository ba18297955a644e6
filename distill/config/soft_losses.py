"""Which loss may use which soft targets, at which temperature: the one place that decides it. No torch.

A sampled codec stores a random distribution whose mean is the teacher's. Only of a loss that is linear in it the
gradient's mean is right, too. Codec `topk` stores an exact distribution over its atoms and a bucket of all other ids,
and a live teacher gives its whole distribution: both allow every loss.
"""

from collections.abc import Iterator
from typing import Any

from distill.config.registry import CODECS, LOSSES, LossEntry
from distill.config.schema import StudentConfig, Targets

SAMPLED, BUCKET, LIVE = "sampled", "topk", "live"
"""Forms of soft targets: of a codec that draws, of one that has a bucket, of a live teacher."""
HIDDEN = "hidden_match"
"""Not a loss of the distribution, but decided here with the others."""
_NOT_LINEAR = "not linear in p"


def form_of(codec: str) -> str:
    """The form of a registered codec's targets."""
    return BUCKET if CODECS[codec].has_bucket else SAMPLED


def verdict(loss: str, temperature: float, form: str) -> str:
    """`yes`, with what holds; or `refused`, with the reason."""
    if loss == HIDDEN:
        return "yes" if form == LIVE else "refused: nothing stored"
    entry = LOSSES[loss]
    if not isinstance(entry, LossEntry):  # of a user's module: a row function of atoms
        return "refused: it takes atoms" if form == LIVE else "yes"
    if form == SAMPLED:
        return "yes, unbiased" if entry.linear and temperature == 1 else f"refused: {_NOT_LINEAR}"
    if form == BUCKET:
        return "yes, biased" if entry.linear and temperature == 1 else "yes, of the bucketed distribution"
    return "yes"


def options_of(student: StudentConfig) -> dict[str, float]:
    """Every option that the loss reads, with its value."""
    entry = LOSSES[student.loss]
    given = {name: getattr(student.loss_options, name) for name in getattr(entry, "options", {})}
    return {name: entry.options[name] if value is None else value for name, value in given.items()}


def option_problems(student: StudentConfig) -> Iterator[str]:
    """Sentences about options that the loss does not read, or not in this range; none about a name that is no loss."""
    if student.loss not in LOSSES.names:
        return
    key, entry = "student.loss_options", LOSSES[student.loss]
    reads = getattr(entry, "options", {})
    for name in ("temperature", "beta", "skew", "alpha"):
        if (value := getattr(student.loss_options, name)) is not None and name not in reads:
            yield f"{key}.{name} is {value}; student.loss {student.loss} reads {', '.join(reads) or 'no options'}"
    options = options_of(student)
    if student.loss == "jensen_shannon" and not 0 < options["beta"] < 1:
        yield f"{key}.beta is {options['beta']}; student.loss jensen_shannon allows (0, 1): at its ends it is 0"
    if student.loss == "alpha_beta":
        for name in ("alpha", "beta"):
            if 0 < options[name] < 0.01:
                yield f"{key}.{name} is {options[name]}; allowed: 0, which is the limit, or 0.01 to 10"
        if not options["alpha"] + options["beta"]:
            yield f"{key}.alpha is 0.0 and beta is 0.0; one of them must be positive"


def refusal(student: StudentConfig, form: str, source: str, way_out: str = "student.targets=live") -> Iterator[str]:
    """A sentence if targets of this form are not for the student's loss, or temperature; none about a name that is no
    loss. source: what the targets are of; way_out: what else to take than they."""
    if student.loss not in LOSSES.names:
        return
    temperature = options_of(student).get("temperature", 1.0)
    found = verdict(student.loss, temperature, form)
    if not found.startswith("refused"):
        return
    entry = LOSSES[student.loss]
    key, value = "student.loss", student.loss
    if getattr(entry, "linear", False):
        key, value = "student.loss_options.temperature", f"{temperature:g}"
    if form == LIVE:
        yield f"{key} is {value} with {source}; allowed: the project's own losses, since a module's takes atoms"
        return
    good = [name for name in LOSSES.names if verdict(name, 1.0, form).startswith("yes")]
    yield (
        f"{key} is {value} with {source}; it is {_NOT_LINEAR}: a sampled codec gives a biased gradient; allowed: "
        f"{', '.join(good)} at temperature 1, codec {', '.join(_bucket_codecs())}, or {way_out}"
    )


def needs_every_id(student: StudentConfig) -> bool:
    """The loss is infinite where the teacher gives an id no probability, as to rows that only the student has."""
    return student.loss == "reverse_kl" or (student.loss == "alpha_beta" and options_of(student)["alpha"] == 0)


def vocabulary_problem(student: StudentConfig, teacher_vocab_size: int, teacher: str) -> str | None:
    """A sentence if the loss cannot compare the student with a live teacher of this vocabulary."""
    size, every = student.model.vocab_size, needs_every_id(student)
    if teacher_vocab_size == size or (teacher_vocab_size < size and not every):
        return None
    why = f"; student.loss {student.loss} is infinite on ids that the teacher lacks" if every else ""
    return (
        f"student.model.vocab_size is {size}; {teacher} has {teacher_vocab_size} ids: allowed is "
        f"{'as many' if every else 'as many, or more (rows added at the end)'}{why}"
    )


def live_problems(run: Any) -> Iterator[str]:
    """Sentences about a RunConfig's live targets, and about what only they can give."""
    student = run.student
    if student.targets is not Targets.live:
        if student.hidden_match:
            yield (
                f"student.hidden_match is {student.hidden_match:g} with student.targets={student.targets.value}; a "
                "cache holds no hidden states: allowed is 0, or student.targets=live"
            )
        return
    if not student.cached:
        yield (
            "student.cached is false with student.targets=live; it stands for labels alone, which need no teacher: set "
            "student.targets=cache"
        )
    yield from refusal(student, LIVE, "student.targets=live")


def _bucket_codecs() -> list[str]:
    return [name for name in CODECS.names if CODECS[name].has_bucket]
