"""Keys of job=lab: a study compares ways to train a student, its arms, in several situations, its regimes.

Studies are files of `conf/study`. A change of the configuration is a mapping of whole keys to values, such as
`student.optim.lr: 0.01`; each is checked as if it came from the command line.
"""

from dataclasses import field
from enum import Enum
from typing import Any

from distill.config.immutable import frozen
from distill.config.ranges import Count, PathText, Positive, PositiveShare, Seed


class ArmKind(Enum):
    """labels: no soft targets; static: weights that do not depend on the teacher; new: what the study is about;
    control: must be no better than labels; other: reported alone."""

    labels = "labels"
    static = "static"
    new = "new"
    control = "control"
    other = "other"


class LabTargets(Enum):
    """captured: what the teachers captured; relabelled: those of the finished last teacher, for all samples."""

    captured = "captured"
    relabelled = "relabelled"


class Stale(Enum):
    rerun = "rerun"
    keep = "keep"


@frozen
class LabTeacher:
    """A teacher that captures in training."""

    set: dict[str, Any] = field(default_factory=dict)
    """Changes of the configuration for it alone."""
    until: PositiveShare = 1.0
    """Share of its steps after which it is ended for good."""


@frozen
class RegimeConfig:
    """A situation of teacher and student."""

    set: dict[str, Any] = field(default_factory=dict)
    """Changes of the configuration."""
    teachers: dict[str, LabTeacher] = field(default_factory=dict)
    """Their caches are merged: of a sample the greatest step counts, then the first teacher. Empty: one, as the
    configuration has it."""
    finished: bool = False
    """All targets are those of the finished last teacher."""
    unknown: bool = False
    """The lead changes in a way that nobody knows beforehand: the new arm is to be better than a static one."""
    curve: str | None = None
    """Name of a curve of several lengths: its labels' runs tell how many tokens labels need for an arm's loss."""
    labels_only: bool = False
    """No teacher and no other arm: one more length of labels for the curve."""


@frozen
class LabArm:
    """A way to train the student."""

    kind: ArmKind = ArmKind.other
    like: str | None = None
    """An arm whose changes and tuned setting it takes before its own changes."""
    set: dict[str, Any] = field(default_factory=dict)
    """Changes of the configuration."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values of keys; all combinations are tried on the tuning seeds of each regime, and the best is tested."""
    targets: LabTargets = LabTargets.captured
    shuffled: bool = False
    """Each sample gets the targets of another one."""
    reversed: bool = False
    """One minus each factor of alpha."""


@frozen
class Limits:
    """Of differences of mean held-out loss, nats; a verdict is about the 95 % interval over pairs of equal seed."""

    same: Positive = 0.01
    """The new arm passes where the upper end of (new - best static) is below; it fails where the lower end is above."""
    better: Positive = 0.03
    """It is better where the upper end of (new - best static) is below minus this."""
    control: Positive = 0.01
    """A control passes where the upper end of (labels - control) is below."""


@frozen
class LabConfig:
    """Of job=lab."""

    name: str | None = None
    """Of the study."""
    regimes: dict[str, RegimeConfig] = field(default_factory=dict)
    arms: dict[str, LabArm] = field(default_factory=dict)
    tuning_seeds: list[Seed] = field(default_factory=lambda: [101, 102])
    first_seed: Seed = 0
    """Of the test seeds, which follow it."""
    pairs: Count = 4
    """Test seeds: students of all arms on the same data, from the same init."""
    limits: Limits = field(default_factory=Limits)
    only: list[str] = field(default_factory=list)
    """Regimes to run now; empty: all. Several processes may share a study so, in run folders of their own."""
    only_arms: list[str] = field(default_factory=list)
    """Arms to run and to summarize; empty: all."""
    dir: PathText = "runs/lab/${lab.name}"
    """Folder for packed data, teachers and caches, which later starts use again; one process at a time works in it."""
    evidence: PathText = "docs/evidence/${lab.name}.jsonl"
    """File to which a line is appended for each student; tables and pictures are written beside it."""
    stale: Stale = Stale.rerun
    """What to do with lines that other sources made: students are trained again, or the lines count."""
    summary_only: bool = False
    """Train nothing; summarize the lines that are there."""
