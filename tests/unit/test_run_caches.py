"""The caches that a student opens."""

from types import SimpleNamespace

import pytest

from distill.run import caches


class Opened:
    """A reader of a cache whose teacher has published so many shards."""

    published = 3

    def __init__(self, folder, view=None):
        self.view = view or {"streams": {"teacher-00000": Opened.published}}
        self.header = SimpleNamespace(vocab_size=8)

    def read(self, ids, digests):
        assert not len(ids)


@pytest.mark.parametrize("published", [2, 3, 4])
def test_all_ranks_see_what_the_main_one_saw(monkeypatch, published):
    """One that looked a moment earlier, or later, has no other levels of the teacher."""
    monkeypatch.setattr(caches, "CacheReader", Opened)
    monkeypatch.setattr(caches, "check_cache", lambda *arguments, **options: None)
    monkeypatch.setattr(caches, "cache_folders", lambda run: {"main": "cache"})
    monkeypatch.setattr(Opened, "published", published)
    main = {"streams": {"teacher-00000": 3}}
    run = SimpleNamespace(
        restored=None,
        config=SimpleNamespace(student=SimpleNamespace(model=SimpleNamespace(vocab_size=8))),
        dist=SimpleNamespace(from_main=lambda view: main),
        data=SimpleNamespace(tokenizer=None, train={"main": None}),
    )
    assert [reader.view for reader in caches.open_readers(run)] == [main]
