"""Power goes at any call of the system: only what had been fsynced is on the disk."""

import os
import shutil
from pathlib import Path

from distill.cache import CacheReader, CacheWriter
from tests.crash import _checker as checker
from tests.workers.cache_writers import header, put


class Disk:
    """Watches the calls of a process and knows, at any moment, the least that a power cut may leave of a folder.

    A file has the bytes of its last fsync; a name is there, or gone, since the last fsync of its folder.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.moments = Path(root), []
        self._synced: dict[int, bytes] = {}
        """Bytes by inode."""
        self._names: dict[Path, int] = {}
        """Inodes by name, as folders were fsynced."""
        self._folders = {self.root}
        for name in ("fsync", "replace", "close"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), name))

    def _watched(self, real, name):
        def call(*args, **kwargs):
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                if path.is_relative_to(self.root):
                    self._fsync(path)
            found = real(*args, **kwargs)
            self.moments.append((dict(self._names), dict(self._synced), set(self._folders)))
            return found

        return call

    def _fsync(self, path):
        if path.is_dir():
            self._folders |= {each for each in path.iterdir() if each.is_dir()} | {path}
            for name in [name for name in self._names if name.parent == path]:
                del self._names[name]
            self._names |= {each: each.stat().st_ino for each in path.iterdir() if each.is_file()}
        else:
            self._synced[path.stat().st_ino] = path.read_bytes()

    def restore(self, moment, folder):
        """What is left after a power cut at a moment."""
        names, synced, folders = self.moments[moment]
        shutil.rmtree(folder, ignore_errors=True)
        for each in sorted(folders):
            (folder / each.relative_to(self.root)).mkdir(parents=True, exist_ok=True)
        for name, inode in names.items():
            at = folder / name.relative_to(self.root)
            if at.parent.is_dir():
                at.write_bytes(synced.get(inode, b""))


def test_power_cut_at_any_moment(tmp_path, monkeypatch):
    """Every published row points at whole bytes; what `flush` has promised is there; writers go on."""
    promised = []
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        (tmp_path / "disk").mkdir()
        with CacheWriter(tmp_path / "disk", header(), writer="w", shard_samples=1) as writer:
            for sample in range(4):
                put(writer, [sample])
                writer.flush()
                promised.append(len(disk.moments))
    assert len(disk.moments) > 30
    for moment in range(len(disk.moments)):
        folder = tmp_path / "after"
        disk.restore(moment, folder)
        scan = checker.scan(folder)
        assert scan.problems == []
        for sample, since in enumerate(promised):
            assert moment < since or (sample, 0) in scan.records, f"sample {sample} is gone"
        if (folder / "cache.json").exists():
            assert CacheReader(folder).covers(range(4)).sum() == len(scan.records)
    with CacheWriter(folder, header(), writer="w") as writer:
        put(writer, [5])
    assert CacheReader(folder).covers([5]).all()
