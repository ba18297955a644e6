"""Imports from end to end: foreign files of a known teacher, matched to a packed corpus, read back through the cache.

The teacher is a table: its distribution depends on the last token alone, so that what any position of any sample must
hold is known without an order.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distill.cache import CacheReader
from distill.config.errors import CacheError, ConfigError, DataError
from distill.config.schema import CorpusConfig, DataConfig, Source, TokenizerConfig
from distill.data.prepare import prepare
from distill.tools.import_cache import add_arguments, import_files

S, V, K = 16, 300, 6


def table() -> np.ndarray:
    """float64 log-probabilities [V, V]: of the next token, by the last one."""
    z = np.random.default_rng(5).normal(0, 2.5, (V, V))
    return z - np.log(np.exp(z).sum(1, keepdims=True))


TEACHER = table()


class World:
    """A packed corpus of a few documents, some of which are cut by the ends of samples."""

    def __init__(self, folder: Path, bos: str | None = "<|begin_of_text|>"):
        draw = np.random.default_rng(1)
        words = ["the", "cat", "sat", "on", "a", "mat", "x = 3", "return", "\n"]
        texts = [f"{i} " + " ".join(draw.choice(words, draw.integers(2, 20))) for i in range(40)]
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        corpus = CorpusConfig(Source.files, [str(folder / "a.jsonl")], held_out=0.0)
        config = DataConfig({"main": corpus}, TokenizerConfig(vocab_size=V, bos=bos), sample_tokens=S)
        data = prepare(config, folder / "data", V)
        self.folder, self.tokenizer, self.corpus = folder, data.tokenizer, data.train["main"]
        self.frame = ("--bos", bos or "")
        (self.packed,) = (folder / "data").glob("main-*")
        (self.file,) = (folder / "data").glob("tokenizer-*/tokenizer.json")
        self.all = self.corpus.take(np.arange(len(self.corpus)))
        front, eos = [] if bos is None else [data.tokenizer.bos_id], data.tokenizer.eos_id
        self.documents = [[*front, *ids, eos] for ids, _ in data.tokenizer.encode_batch(texts)]

    def run(self, kind: str, *files: Path | str, more: tuple[str, ...] = ()):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        required = ["--from", kind, "--corpus", self.packed, "--tokenizer", self.file, "--vocab-size", V]
        words = [self.folder / "cache", *files, *required, *self.frame, *more]
        return import_files(parser.parse_args(list(map(str, words))))

    def read(self):
        """ids, probabilities, covered, label's log-probability, entropy: each [samples, S, ...]."""
        reader = CacheReader(self.folder / "cache")
        found = reader.read(np.arange(len(self.corpus)), self.all.digests)
        return [part.numpy().reshape(len(self.corpus), S, *part.shape[1:]) for part in found.targets]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def top(row: np.ndarray, k: int = K) -> list[int]:
    return sorted(range(V), key=lambda i: -row[i])[:k]


def vllm(tokens: list[int], k: int = K) -> str:
    found: list = [None]
    for last, token in pairwise(tokens):
        row = TEACHER[last]
        wanted = dict.fromkeys([*top(row, k), token])
        found.append({str(i): {"logprob": row[i], "rank": 1 + sum(bool(v > row[i]) for v in row)} for i in wanted})
    return json.dumps({"prompt_token_ids": list(map(int, tokens)), "prompt_logprobs": found}) + "\n"


def top_parquet(path: Path, sequences: list[list[int]], less: int = 0) -> Path:
    """Top-k of every token, or of all but the last."""
    tops = [[top(TEACHER[t]) for t in tokens[: len(tokens) - less]] for tokens in sequences]
    values = [[[TEACHER[t][i] for i in ids] for t, ids in zip(s, ids_of)] for s, ids_of in zip(sequences, tops)]
    pq.write_table(pa.table({"input_ids": sequences, "topk_ids": tops, "topk_logprobs": values}), path)
    return path


def check(world: World, covered: np.ndarray, exact_labels: bool = False) -> None:
    """Where covered: the teacher's top, residual, and statistics within what a byte holds; elsewhere nothing."""
    ids, probs, is_covered, label, entropy = world.read()
    assert np.array_equal(is_covered, covered)
    for i, j in np.ndindex(*covered.shape):
        if not covered[i, j]:
            assert not probs[i, j].any()
            continue
        row, target = TEACHER[world.all.ids[i, j]], world.all.ids[i, j + 1]
        kept = top(row)
        found = {int(t): float(p) for t, p in zip(ids[i, j], probs[i, j]) if p > 0}
        assert sorted(found) == sorted(kept)
        for t in kept:
            assert found[t] == pytest.approx(math.exp(row[t]), rel=0.06)
        rest = 1 - math.fsum(math.exp(row[t]) for t in kept)
        assert 1 - sum(found.values()) == pytest.approx(rest, rel=0.03, abs=1e-5)
        size = -row[target]
        error = math.sqrt(32 * size) / 250 + 0.001
        if target in kept or exact_labels:
            assert label[i, j] == pytest.approx(row[target], abs=error)
        else:
            assert row[target] - error <= label[i, j] <= math.log(rest) + error
        lumped = -math.fsum(math.exp(row[t]) * row[t] for t in kept) - rest * math.log(rest)
        assert entropy[i, j] == pytest.approx(lumped, abs=0.02)


def test_samples_in_any_order_are_found_by_their_tokens(world):
    order = np.random.default_rng(0).permutation(len(world.corpus))
    lines = [vllm(world.all.ids[i].tolist()) for i in order]
    (world.folder / "a.jsonl").write_text("".join(lines))
    report = world.run("vllm", world.folder / "a.jsonl")
    assert (report.matched, report.samples, report.partial) == (len(order), len(order), 0)
    check(world, world.all.mask[:, 1:], exact_labels=True)
    header = CacheReader(world.folder / "cache").header
    assert header.stream["import"]["from"] == "vllm" and f"top-{K}" in header.stream["import"]["bias"]
    (origin,) = CacheReader(world.folder / "cache").summary
    assert (origin.source, origin.teacher) == ("import", "import:vllm")


def test_another_temperature_is_in_the_header_and_makes_another_cache(world):
    (world.folder / "a.jsonl").write_text("".join(vllm(ids.tolist()) for ids in world.all.ids))
    world.run("vllm", world.folder / "a.jsonl", more=("--temperature", "0.7"))
    bias = CacheReader(world.folder / "cache").header.stream["import"]["bias"]
    assert "processed at temperature 0.7, so these are other targets than the teacher's own" in bias
    with pytest.raises(CacheError, match="does not fit"):
        world.run("vllm", world.folder / "a.jsonl")
    with pytest.raises(ConfigError, match="--temperature is no option of --from parquet"):
        world.run("parquet", world.folder / "a.jsonl", more=("--temperature", "1"))


def test_samples_without_their_last_label_leave_only_its_place_open(world):
    path = top_parquet(world.folder / "a.parquet", [s[:S].tolist() for s in world.all.ids], less=1)
    world.run("parquet", path)
    covered = world.all.mask[:, 1:].copy()
    covered[:, -1] = False
    check(world, covered)


@pytest.mark.parametrize("bos", [True, False])
def test_documents_in_any_order_are_put_together_to_samples(world, bos):
    """Without eos, with padding in its place, and with or without bos: what each position must hold is unchanged."""
    order = np.random.default_rng(0).permutation(len(world.documents))
    pad = world.tokenizer.eos_id
    sequences = [[*world.documents[i][1 - bos : -1], pad] for i in order]
    path = top_parquet(world.folder / "a.parquet", sequences, less=1)
    # The end of the last document lies behind the last sample, so it is no document of the corpus.
    report = world.run("parquet", path, more=("--allow-unmatched",))
    assert report.unmatched <= 1 and report.matched >= 39
    covered = world.all.mask[:, 1:].copy()
    if not bos:  # nothing says what follows bos
        covered &= world.all.ids[:, :-1] != world.tokenizer.bos_id
    last = len(world.documents) - 1
    if report.unmatched:
        first = sum(map(len, world.documents[:last]))
        covered.ravel()[first:] = False
    check(world, covered)


def test_a_bos_that_only_the_other_stack_has(tmp_path):
    world = World(tmp_path, bos=None)
    # No id of the corpus; the row after it is about a document's first token, which has no place.
    bos = min(set(range(V)) - set(world.all.ids.ravel().tolist()))
    token = world.tokenizer.token(bos)
    sequences = [[bos, *document] for document in world.documents[:-1]]
    path = top_parquet(world.folder / "a.parquet", sequences)
    with pytest.raises(CacheError, match="neither a sample nor a document"):
        world.run("parquet", path)
    with pytest.raises(DataError, match="--their-bos is '<none>'"):
        world.run("parquet", path, more=("--their-bos", "<none>"))
    world.run("parquet", path, more=("--their-bos", token))
    covered = world.all.mask[:, 1:].copy()
    covered.ravel()[sum(map(len, world.documents[:-1])) :] = False
    check(world, covered)


def test_truncated_documents_are_found_by_their_beginning(world):
    longest = max(range(20), key=lambda i: len(world.documents[i]))
    cut = world.documents[longest][:12]
    path = top_parquet(world.folder / "a.parquet", [cut])
    with pytest.raises(CacheError, match=r"a\.parquet row 0 \(12 tokens: .*neither a sample nor a document"):
        world.run("parquet", path)
    report = world.run("parquet", path, more=("--truncated", "12"))
    start = sum(map(len, world.documents[:longest]))
    covered = np.zeros(world.all.mask[:, 1:].size, bool)
    covered[start : start + 12] = world.all.mask[:, 1:].ravel()[start : start + 12]
    assert report.matched == 1 and covered.sum() >= 11
    check(world, covered.reshape(-1, S))


def test_dense_rows_go_through_an_unbiased_codec(world):
    """The mean over all places of a token is its row of the table, within what so many draws allow."""
    rows = [TEACHER[s[:S]].tolist() for s in world.all.ids]
    table = pa.table({"input_ids": [s[:S].tolist() for s in world.all.ids], "logprobs": rows})
    pq.write_table(table, world.folder / "a.parquet")
    world.run("parquet", world.folder / "a.parquet", more=("--codec", "multinomial", "--draws", "16"))
    ids, probs, covered, label, entropy = world.read()
    assert np.array_equal(covered, world.all.mask[:, 1:])
    dense = np.zeros((V, V))
    places = np.zeros(V, int)
    for i, j in zip(*np.nonzero(covered)):
        np.add.at(dense[world.all.ids[i, j]], ids[i, j], probs[i, j])
        places[world.all.ids[i, j]] += 1
        row, target = TEACHER[world.all.ids[i, j]], world.all.ids[i, j + 1]
        assert label[i, j] == pytest.approx(row[target], abs=math.sqrt(32 * -row[target]) / 250 + 0.001)
        assert entropy[i, j] == pytest.approx(-(np.exp(row) * row).sum(), abs=0.02)
    often = int(places.argmax())
    p, draws = np.exp(TEACHER[often]), places[often] * 16
    assert draws > 300
    deviations = (dense[often] / places[often] - p) / np.sqrt(p * (1 - p) / draws)
    assert np.abs(deviations[p > 5 / draws]).max() < 4.5


def test_dense_rows_of_a_smaller_vocabulary_give_other_ids_nothing(world):
    ids = world.all.ids[0, :S]
    rows = [[[-1.0, -2.0, -3.0]] * S]
    pq.write_table(pa.table({"input_ids": [ids.tolist()], "logits": rows}), world.folder / "a.parquet")
    world.run("parquet", world.folder / "a.parquet", more=("--codec", "topk", "--k", "4"))
    found, probs, covered, _, _ = (part[0] for part in world.read())
    mass = sum(math.exp(-i) for i in (1, 2, 3))
    for j in np.flatnonzero(covered):
        got = {int(i): float(p) for i, p in zip(found[j], probs[j])}
        assert [got[i] for i in range(3)] == pytest.approx([math.exp(-1 - i) / mass for i in range(3)], rel=0.06)
        assert sum(got[i] for i in got if i > 2) < 1e-5
    assert covered.any()


def test_megatron_sequences_are_the_samples_of_the_order(world):
    samples = len(world.corpus)
    order = np.random.default_rng(0).permutation(samples)
    order[3] = -1
    for d in range(2):
        members = {"_meta.json": json.dumps({"saver": {"k": K, "p": None, "save_dtype": "fp32"}}).encode()}
        for step in range(samples // 4):
            here = world_ids = order[4 * step + 2 * d : 4 * step + 2 * d + 2]
            tokens = world.all.ids[np.maximum(world_ids, 0), :S]
            tops = torch.tensor([[top(TEACHER[t]) for t in sequence] for sequence in tokens])
            values = torch.tensor(np.array([[TEACHER[t][top(TEACHER[t])] for t in s] for s in tokens])).float()
            buffer = io.BytesIO()
            lists = {
                "values": [values.transpose(0, 1)],
                "indices_low": [tops.transpose(0, 1).to(torch.uint16)],
                "bit_17": [torch.zeros(S, len(here), K, dtype=torch.bool)],
            }
            torch.save(lists, buffer)
            members[f"{step}.pt.zst"] = pa.compress(buffer.getvalue(), codec="zstd", asbytes=True)
        with tarfile.open(world.folder / f"cp0_dp{d}__{samples // 4 - 1}.tar", "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ConfigError, match="--order is missing"):
        world.run("megatron", world.folder)
    np.save(world.folder / "order.npy", order[:4])
    with pytest.raises(DataError, match=r"has 4 sample ids, but .*iteration 1 dp0.* is one sequence more"):
        world.run("megatron", world.folder, more=("--order", str(world.folder / "order.npy")))
    (world.folder / "order.txt").write_text("\n".join(map(str, order)))
    report = world.run("megatron", world.folder, more=("--order", str(world.folder / "order.txt")))
    assert report.left_out == 1
    covered = world.all.mask[:, 1:].copy()
    covered[sorted(set(range(samples)) - set(order[: samples // 4 * 4].tolist()))] = False
    check(world, covered)


def test_an_import_that_was_cut_short_goes_on(world):
    lines = [vllm(ids.tolist()) for ids in world.all.ids]
    (world.folder / "a.jsonl").write_text("".join(lines[:9]) + lines[9][:200])
    with pytest.raises(CacheError, match=r"a\.jsonl line 10: not JSON"):
        world.run("vllm", world.folder / "a.jsonl")
    (world.folder / "a.jsonl").write_text("".join(lines))
    world.run("vllm", world.folder / "a.jsonl")
    world.run("vllm", world.folder / "a.jsonl")
    assert sum(origin.samples for origin in CacheReader(world.folder / "cache").summary) == len(lines)
    check(world, world.all.mask[:, 1:], exact_labels=True)


def test_what_is_not_in_the_corpus_is_named(world):
    lines = [vllm(world.all.ids[0].tolist()), vllm([7, 8, 9, 10]), vllm([11, 8, 9, 10])]
    (world.folder / "a.jsonl").write_text("".join(lines))
    with pytest.raises(CacheError, match=r"a\.jsonl line 2 \(4 tokens: 7 8 9 10\): neither .* after 1 that are"):
        world.run("vllm", world.folder / "a.jsonl")
    report = world.run("vllm", world.folder / "a.jsonl", more=("--allow-unmatched",))
    assert (report.matched, report.unmatched) == (1, 2) and "7 8 9 10" in "\n".join(report.lines())
    (world.folder / "b.jsonl").write_text(lines[1])
    with pytest.raises(CacheError, match="none of 1 sequences is in the corpus"):
        world.run("vllm", world.folder / "b.jsonl", more=("--allow-unmatched",))


def test_values_that_are_no_probabilities_and_arguments_that_do_not_fit(world):
    ids = world.all.ids[0].tolist()
    record = {"input_ids": [ids[:S]], "topk_ids": [[[1, 2]] * S], "topk_logprobs": [[[-0.1, -0.2]] * S]}
    pq.write_table(pa.table(record), world.folder / "a.parquet")
    with pytest.raises(CacheError, match=r"a\.parquet row 0: kept probabilities sum to 1\.72 on average"):
        world.run("parquet", world.folder / "a.parquet")
    record["topk_ids"] = [[[1, V]] * S]
    record["topk_logprobs"] = [[[-1.0, -2.0]] * S]
    pq.write_table(pa.table(record), world.folder / "a.parquet")
    with pytest.raises(CacheError, match=rf"row 0: id {V}; the vocabulary has {V} ids"):
        world.run("parquet", world.folder / "a.parquet")
    for more, named in [
        (("--shifted",), "--shifted is no option of --from vllm"),
        (("--order", "x"), "--order is no option of --from vllm"),
        (("--k", "0"), "--k is 0"),
        (("--vocab-size", "100"), "--vocab-size is 100"),
        (("--step", "-1"), "--step is -1"),
    ]:
        (world.folder / "a.jsonl").write_text(vllm(ids))
        with pytest.raises(ConfigError, match=named):
            world.run("vllm", world.folder / "a.jsonl", more=more)
