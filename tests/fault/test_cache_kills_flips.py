"""The short form of `make crash ONLY=cache`."""

from distill.cache import CacheWriter, ledger, shard
from tests.crash import _flips, _kills
from tests.crash.__main__ import Progress


def test_kills():
    figures, problems = _kills.run(kills=6, seed=1, progress=Progress(quiet=True))
    assert problems == [] and figures["kills"] == 6
    assert figures["lost"] == figures["wrong"] == figures["duplicated"] == figures["failed"] == 0


def test_flips():
    figures, problems = _flips.run(flips=600, seed=1, progress=Progress(quiet=True))
    assert problems == [] and figures["flips"] == sum(figures[kind] for kind in _flips.KINDS) == 600
    assert figures["unnoticed"] == figures["not named"] == figures["crashed"] == 0


def test_what_is_lost_is_counted(monkeypatch):
    """A writer that publishes no row after its second."""
    real = ledger.LedgerWriter.append

    def forgetful(self, row):
        if row.seq < 2:
            real(self, row)

    monkeypatch.setattr(ledger.LedgerWriter, "append", forgetful)
    figures, problems = _kills.run(kills=1, seed=1, progress=Progress(quiet=True))
    assert figures["lost"] > 0 and any("published before a checkpoint, not there" in problem for problem in problems)


def test_what_is_done_twice_is_counted(monkeypatch):
    """A writer that does not look at what is there."""
    monkeypatch.setattr(CacheWriter, "_undone", lambda self, batch: batch)
    figures, problems = _kills.run(kills=3, seed=1, progress=Progress(quiet=True))
    assert figures["duplicated"] > 0 and problems


def test_what_goes_unnoticed_is_counted(monkeypatch):
    """A reader that does not verify records."""
    monkeypatch.setattr(shard.Shard, "verified", lambda self, index, data: data)
    figures, problems = _flips.run(flips=96, seed=1, progress=Progress(quiet=True))
    assert figures["unnoticed"] > 0 and problems
