"""The short form of `make crash`."""

import random
import time
from collections import Counter

import pytest

from distill.cache import CacheWriter, publish, view
from distill.config.schema import ConsoleMode
from distill.config.terminal import Progress
from tests.crash import _flips, _kills, _teacher, _traffic


def silent():
    return Progress(str, mode=ConsoleMode.off)


@pytest.mark.parametrize("seed", [1])
def test_kills(seed):
    figures, problems = _kills.run(kills=6, seed=seed, progress=silent())
    assert problems == [] and figures["kills"] == 6
    assert figures["lost"] == figures["wrong"] == figures["duplicated"] == figures["failed"] == 0


@pytest.mark.parametrize("seed", [1])
def test_flips(seed):
    figures, problems = _flips.run(flips=600, seed=seed, progress=silent())
    assert problems == [] and figures["flips"] == sum(figures[kind] for kind in _flips.KINDS) == 600
    assert figures["unnoticed"] == figures["not named"] == figures["crashed"] == 0


@pytest.mark.parametrize("seed", [1])
def test_traffic(seed):
    figures, problems = _traffic.run(seconds=5, seed=seed, progress=silent())
    assert problems == [] and figures["traffic: steps"] > 0 and figures["traffic: compactions"] > 0


def test_what_is_lost_is_counted(monkeypatch):
    """A writer that publishes no shard after its second."""
    real = publish._put

    def forgetful(store, header, *args):
        if header.seq < 2:
            real(store, header, *args)

    monkeypatch.setattr(publish, "_put", forgetful)
    figures, problems = _kills.run(kills=1, seed=1, progress=silent())
    assert figures["lost"] > 0 and any("published before a checkpoint, not there" in problem for problem in problems)


def test_what_is_done_twice_is_counted(monkeypatch, tmp_path):
    """A writer that does not look at what is there, and a run that goes on from its beginning."""
    monkeypatch.setattr(CacheWriter, "_undone", lambda self, batch: batch)
    _teacher.prepare()
    counts, problems = Counter(), []
    this = _kills._Run(tmp_path / "run", random.Random(1), counts, problems)
    this.launch(None)
    assert problems == []
    this.start = 0
    this.launch(None)
    assert counts["duplicated"] == len(_teacher.expected()) == len(problems)


@pytest.mark.parametrize("first", ["fill", "rank0"])
def test_no_verdict_depends_on_who_is_quicker(monkeypatch, first):
    """In the run without kills one process is done before the others begin, in the one with kills another."""
    work = _teacher.work

    def in_turn(folder, part, checkpoint):
        leads = first if folder.parent.name == "whole" else {"fill": "rank0", "rank0": "fill"}[first]
        done = checkpoint.with_name(f"{checkpoint.name.split('-')[0]}-done")
        while part.name != leads and not done.exists():
            time.sleep(0.002)
        work(folder, part, checkpoint)
        if part.name == leads:
            done.touch()

    monkeypatch.setattr(_teacher, "work", in_turn)
    _, problems = _kills.run(kills=0, seed=1, progress=silent())
    assert problems == []


def test_what_goes_unnoticed_is_counted(monkeypatch):
    """A reader that does not verify records."""
    monkeypatch.setattr(view, "verified", lambda path, sample_id, token_digest, expected, record: record)
    figures, problems = _flips.run(flips=120, seed=1, progress=silent())
    assert figures["unnoticed"] + figures["crashed"] > 0 and problems


def test_wrong_bytes_under_traffic_are_counted(monkeypatch):
    """The independent copy is another one from a step on."""
    real = _teacher.encoded

    def other(sample, step):
        return real(sample, step) if step < 4 else b"another"

    monkeypatch.setattr(_traffic.teacher, "encoded", other)
    _, problems = _traffic.run(seconds=5, seed=1, progress=silent())
    assert any("wrong bytes" in problem for problem in problems)
