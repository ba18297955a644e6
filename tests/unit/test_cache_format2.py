"""The converter of format 2: what its ledgers retire or hold in objects, what damage it refuses, and what stops it."""

import itertools
import shutil
from pathlib import Path

import pytest

from distill.cache import CacheReader
from distill.cache.open_store import open_store
from distill.cache.seal import seal, unseal
from distill.config.errors import CacheError
from distill.tools import format2
from distill.tools.commands import main
from tests import format_reader

OLD = Path(__file__).parents[1] / "golden" / "cache-v2" / "systematic"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def ledger_rows(old):
    return [unseal(line) for line in (old / "ledger" / "w.jsonl").read_bytes().splitlines(keepends=True)]


def retire(old, *ranges):
    rows = ledger_rows(old)
    row = {"kind": "retire", "writer": "compact", "seq": 0, "cache": rows[0]["cache"]}
    retired = [{"ledger": "w", "first": first, "last": last} for first, last in ranges]
    (old / "ledger" / "compact.jsonl").write_bytes(seal(row | {"retired": retired}))


def converted(old, new):
    format2.convert(open_store(old), open_store(new), 10**6)
    return format_reader.cache(new)


def test_what_is_retired_stays_behind(old, tmp_path):
    whole = converted(OLD, tmp_path / "whole")
    retire(old, (0, 0))
    (old / "shards" / ledger_rows(old)[0]["shard"]).unlink()  # as a purge does
    assert converted(old, tmp_path / "new") == {9: whole[9]}
    assert [row[2] for row in CacheReader(tmp_path / "new").losses.json()] == [4]


def test_rows_in_objects_and_a_torn_one(old, tmp_path):
    lines = (old / "ledger" / "w.jsonl").read_bytes().splitlines(keepends=True)
    (old / "ledger" / "w.jsonl").write_bytes(lines[0])
    (old / "ledger" / "w").mkdir()
    (old / "ledger" / "w" / "000000001.json").write_bytes(lines[1])
    (old / "ledger" / "w" / "000000002.json").write_bytes(lines[2][:40])
    found = converted(old, tmp_path / "new")
    assert found == converted(OLD, tmp_path / "whole")
    # The stream is not complete, since the row that said so was never published.
    reader = CacheReader(tmp_path / "new")
    assert not reader.finished and reader.frontier == 4 and CacheReader(tmp_path / "whole").finished


def test_a_record_that_a_later_step_supersedes_stays_behind_and_its_loss_counts(old, tmp_path):
    """The second shard again under another name, with the first sample's id in place of its own."""
    rows = ledger_rows(old)
    source = old / "shards" / rows[1]["shard"]
    shard = format2.OldShard(open_store(old), format2.CacheHeader(300, "", "", 8, 12, None, 0), rows[1])
    assert shard.columns.sample_ids.tolist() == [9]
    again = [row | {"writer": "x", "seq": seq} for seq, row in enumerate([rows[0], rows[1]])]
    (old / "ledger" / "x.jsonl").write_bytes(b"".join(map(seal, again)))
    new = converted(old, tmp_path / "new")
    assert new == converted(OLD, tmp_path / "whole") and source.exists()
    losses, once = CacheReader(tmp_path / "new").losses.json(), CacheReader(tmp_path / "whole").losses.json()
    # Of two shards with one loss bin, one has no record that counts, and its sums come along.
    assert [row[3] for row in losses] == [2 * row[3] for row in once]


@pytest.mark.parametrize("name", ["cache.json", "ledger/w.jsonl", "shards/0", "shards/1", "ranks"])
def test_damage_is_refused_with_the_version_that_can_repair_it(old, tmp_path, name, capsys):
    path = old / name
    if name.startswith("shards"):
        path = sorted((old / "shards").iterdir())[int(name[-1])]
    if name == "ranks":
        (path,) = old.glob("ranks-*")
    data = path.read_bytes()
    for place in range(7, len(data) - 1, len(data) // 9):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        assert main(["compact", str(old), "--into", str(tmp_path / f"new{place}")]) == 2
        said = capsys.readouterr().err
        assert "codistill 0.3.0 can repair" in said or name == "ranks", place
    path.unlink()
    assert main(["compact", str(old), "--into", str(tmp_path / "new")]) == 2


def test_the_present_tools_name_the_way(old, capsys):
    for command in (["stats"], ["compact"]):
        assert main([*command, str(old)]) == 2
        assert f"compact {old} --into NEW" in capsys.readouterr().err


def test_a_conversion_that_was_stopped_goes_on(old, tmp_path, monkeypatch):
    whole = converted(OLD, tmp_path / "whole")
    from distill.tools import repack

    real, left = repack.publish_shard, itertools.count()

    def limited(*args, **kwargs):
        if next(left) == 1:
            raise CacheError("stopped here")
        return real(*args, **kwargs)

    monkeypatch.setattr(repack, "publish_shard", limited)
    with pytest.raises(CacheError, match="stopped here"):
        format2.convert(open_store(old), open_store(tmp_path / "new"), 1)
    assert len(format_reader.cache(tmp_path / "new")) == 2
    assert format2.convert(open_store(old), open_store(tmp_path / "new"), 1)[0] == 1
    assert format_reader.cache(tmp_path / "new") == whole
    assert CacheReader(tmp_path / "new").losses == CacheReader(tmp_path / "whole").losses
