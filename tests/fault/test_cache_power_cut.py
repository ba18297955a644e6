"""Power goes at any call of the system: only what had been fsynced is on the disk."""

import os
import shutil
from pathlib import Path

from distill.cache import CacheReader, CacheWriter
from distill.cache.format import shard_name
from distill.cache.open_store import open_store
from distill.tools.repair import repair
from distill.tools.verify import verify
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
        for name in ("fsync", "link", "unlink", "replace", "close"):
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
    """Every shard is whole; what `flush` has promised is there, with or without a catalog; writers go on."""
    promised = []
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        (tmp_path / "disk").mkdir()
        with CacheWriter(tmp_path / "disk", header(), writer="w", shard_samples=1, index_every=2) as writer:
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
            assert verify(open_store(folder)).problems == []
    with CacheWriter(folder, header(), writer="w") as writer:
        put(writer, [5])
    assert CacheReader(folder).covers([5]).all()


def test_a_repair_and_a_power_cut_at_any_moment(tmp_path, monkeypatch):
    """The report is there before anything else has changed; the next repair finishes, and says what was lost."""
    root = tmp_path / "disk"
    with CacheWriter(root, header(), writer="w", shard_samples=2) as writer:
        for sample in range(0, 6, 2):
            put(writer, [sample, sample + 1])
        writer.finish()
    path = root / shard_name("w", 2)
    path.write_bytes(path.read_bytes()[:-1])
    before = {p.relative_to(root): p.read_bytes() for p in root.rglob("*.*") if p.suffix != ".lock"}
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        for each in [root, *(p for p in root.rglob("*") if p.is_dir())]:
            for file in (p for p in each.iterdir() if p.is_file()):
                disk._fsync(file)
            disk._fsync(each)
        repair(open_store(root))
    assert len(disk.moments) > 20
    for moment in range(len(disk.moments)):
        folder = tmp_path / "after"
        disk.restore(moment, folder)
        there = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*") if p.suffix != ".lock"}
        is_reported = bool(list(folder.glob("quarantine/repair-000000.json*")))
        assert is_reported or {name: there.get(name) for name in before} == before
        done = repair(open_store(folder))
        assert done.lost == [3] or (folder / "quarantine" / "repair-000000.json").exists()
        assert verify(open_store(folder), decode=True).problems == []
        assert CacheReader(folder).covers(range(6)).tolist() == [True, True, True, False, True, True]
        CacheWriter(folder, header(), writer="w").close()
