"""A cache as Parquet, read back with pyarrow alone, against what the reader gives a student."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distill.cache import CacheHeader, CacheReader, CacheWriter, make_codec
from distill.config.errors import CacheError
from distill.config.schema import CodecConfig
from distill.tools import export_cache as module
from distill.tools.export_cache import Per, export

S, V, N = 12, 200, 23


def cache(folder, codec: CodecConfig):
    """23 samples of random teachers, of which 20 are stored, two of them again by a later step; some labels masked."""
    draw = torch.Generator().manual_seed(3)
    header = CacheHeader(V, "tokenizer", "corpus", S, N, codec, 7)
    digests = np.arange(N, dtype=np.uint64) * np.uint64(1234567)
    made = make_codec(codec, V)
    with CacheWriter(folder, header, writer="w", shard_samples=4) as writer:
        for step, ids in [(1, list(range(15))), (2, [3, 7, 18, 19]), (4, [20, 21])]:
            logits = torch.randn(len(ids) * S, V, generator=draw) * 3
            labels = torch.randint(0, V, (len(ids) * S,), generator=draw)
            valid = torch.rand(len(ids) * S, generator=draw) < 0.8
            found = made.select(
                logits,
                logits.logsumexp(-1),
                seed=7,
                sample_ids_T=torch.tensor(ids).repeat_interleave(S),
                positions_T=torch.arange(S).repeat(len(ids)),
            )
            label = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
            writer.put(
                np.array(ids),
                digests[ids],
                found.atoms,
                label,
                found.entropy_T,
                valid,
                step=step,
                tokens_seen=step,
                teacher=f"t{step}",
            )
    return CacheReader(folder), digests


CODECS = [
    CodecConfig("systematic", draws=9),
    CodecConfig("topk", k=5),
    CodecConfig("threshold"),
]


def told(reader, digests):
    """What a student gets, by (sample, position): a dictionary of probabilities, and the statistics."""
    result = reader.read(np.arange(N), digests)
    t = result.targets
    found = {}
    for row in range(N * S):
        if t.covered_T[row]:
            atoms = {i: p for i, p in zip(t.ids_TK[row].tolist(), t.probs_TK[row].tolist()) if p > 0}
            found[divmod(row, S)] = (atoms, float(t.label_logprob_T[row]), float(t.entropy_T[row]))
    return found, result.step_B.tolist(), result.shard_loss_B.tolist()


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
@pytest.mark.parametrize("per", list(Per))
def test_every_target_is_in_the_file_as_a_student_would_get_it(tmp_path, monkeypatch, codec, per):
    monkeypatch.setattr(module, "GROUP_TOKENS", 3 * S)
    reader, digests = cache(tmp_path / "cache", codec)
    wanted, steps, losses = told(reader, digests)
    counts = export(reader, tmp_path / "out" / "a.parquet", per)
    file = pq.ParquetFile(tmp_path / "out" / "a.parquet")
    found = {}
    for row in file.read().to_pylist():
        i = row["sample_id"]
        assert (row["step"], row["teacher"], row["source"]) == (steps[i], f"t{steps[i]}", "capture")
        assert row["loss"] == pytest.approx(losses[i])
        one = per is Per.token
        for j in [row["position"]] if one else [j for j, covered in enumerate(row["covered"]) if covered]:
            ids, probs, *rest = (
                row[name] if one else row[name][j] for name in ("ids", "probs", "label_logprob", "entropy")
            )
            assert (i, j) not in found and len(set(ids)) == len(ids)
            found[i, j] = (dict(zip(ids, probs)), *rest)
        if not one:
            empty = [j for j, covered in enumerate(row["covered"]) if not covered]
            assert all(not row["ids"][j] and row["entropy"][j] is None for j in empty) and len(row["covered"]) == S
    assert found == wanted and len(wanted) > 150
    assert counts.tokens == len(wanted) and counts.samples == 19
    assert file.num_row_groups >= 7 and file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert max(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)) <= (
        3 * S if per is Per.token else 3
    )


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    reader, _ = cache(tmp_path / "cache", CODECS[0])
    path = tmp_path / "a.parquet"
    path.write_bytes(b"old")
    monkeypatch.setattr(module, "GROUP_TOKENS", S)
    whole, calls = module._table, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return whole(*args)

    monkeypatch.setattr(module, "_table", failing)
    with pytest.raises(CacheError, match=r"a\.parquet: cannot be written: No space left"):
        export(reader, path)
    assert path.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "cache"]


def test_a_folder_is_no_file(tmp_path):
    reader, _ = cache(tmp_path / "cache", CODECS[0])
    with pytest.raises(CacheError, match="is a folder; name a file"):
        export(reader, tmp_path)
