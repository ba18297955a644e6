"""What coding ids by their rank after the previous token would save, on the cache of a trained tiny teacher.

Records store ranks by corpus frequency. Here each token's ids are ranked by how often they follow that token in the
training text (ties by corpus frequency) and the same coder codes them; ids are charged what records shrink by when
their ranks are 0, 1, 2, ... instead. `saved` is the share of the whole record, `saved_of_ids` of the ids' part.
FOLDER=run of a teacher (job=teacher or codistill, experiment=smoke) saves training one. A table of V x V is what this
takes: at V = 202,048 only its frequent rows could be kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from distill.cache import CacheReader, record
from distill.cache.open_store import open_store
from distill.cache.ranks import invert, load_ranks
from distill.data.packed import PackedCorpus


def run() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("FOLDER") or temporary)
        if not (folder / "cache").exists():
            command = [sys.executable, "-m", "distill", "job=teacher", "experiment=smoke", "tracking=off"]
            subprocess.run([*command, f"hydra.run.dir={folder}"], check=True, stdout=subprocess.DEVNULL)
        return measure(folder)


def measure(folder: Path) -> dict[str, float]:
    reader = CacheReader(folder / "cache")
    [packed] = (folder / "data").glob("main-*")
    corpus = PackedCorpus(packed, "train", "main")
    width, vocab = reader.header.sample_tokens, reader.header.vocab_size
    tokens = corpus.take(np.arange(len(corpus))).ids.astype(np.int64)
    counts_VV = np.zeros((vocab, vocab), np.int64)
    np.add.at(counts_VV, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    by_frequency = invert(load_ranks(open_store(folder / "cache"), reader.header))
    # rank_VV[a, b]: the rank of b after a.
    order_VV = np.lexsort((np.broadcast_to(by_frequency, (vocab, vocab)), -counts_VV), axis=1)
    rank_VV = np.empty_like(order_VV)
    np.put_along_axis(rank_VV, order_VV, np.arange(vocab)[None], axis=1)

    samples = list(reader.samples())
    decoded = reader.decode(samples)
    atoms, valid_T = decoded.atoms, decoded.valid_T.numpy()
    token = np.repeat(np.arange(len(valid_T)), atoms.counts_T.numpy())
    previous_T = np.concatenate([tokens[sample.sample_id, :width] for sample in samples])
    first = np.cumsum(atoms.counts_T.numpy()) - atoms.counts_T.numpy()
    ids = {
        "frequency": by_frequency[atoms.ids_N.numpy()],
        "previous": rank_VV[previous_T[token], atoms.ids_N.numpy()],
        "none": np.arange(len(token)) - first[token],
    }
    sizes = {}
    for name, ranks in ids.items():
        changed = atoms._replace(ids_N=torch.from_numpy(ranks.astype(np.int32)))
        statistics = (decoded.label_logprob_T.numpy(), decoded.entropy_T.numpy(), valid_T)
        encoded = record.encode(changed, *statistics, width, np.arange(vocab), reader.codec)
        sizes[name] = len(encoded.records) / int(valid_T.sum())
    saved = sizes["frequency"] - sizes["previous"]
    return {
        "bytes_by_frequency": sizes["frequency"],
        "bytes_by_previous": sizes["previous"],
        "id_bits_by_frequency": 8 * (sizes["frequency"] - sizes["none"]) * int(valid_T.sum()) / len(token),
        "id_bits_by_previous": 8 * (sizes["previous"] - sizes["none"]) * int(valid_T.sum()) / len(token),
        "saved": saved / sizes["frequency"],
        "saved_of_ids": saved / (sizes["frequency"] - sizes["none"]),
        "atoms_per_token": len(token) / int(valid_T.sum()),
    }
