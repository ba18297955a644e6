"""Loss by position against a loop over tokens."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from distill.data.join import Batch, Joined
from distill.model import Transformer
from student import positions
from student.evaluate import evaluate
from tests.unit.test_model_attention import config_of, random_documents


class OneRank:
    device, rank, world = torch.device("cpu"), 0, 1

    def sum(self, tensor):
        return tensor


def batch_of(seed, rows=3, length=50):
    g = torch.Generator().manual_seed(seed)
    zeros = np.zeros(rows, np.int64)
    return Batch(
        ids_BS=torch.randint(0, 64, (rows, length), generator=g),
        labels_BS=torch.randint(0, 64, (rows, length), generator=g),
        valid_BS=torch.rand(rows, length, generator=g) < 0.7,
        documents_BS=random_documents(rows, length, seed, rate=0.05),
        sample_ids_B=zeros,
        corpus_B=zeros,
        digests_B=zeros.astype(np.uint64),
        **Joined.none(rows)._asdict(),
    )


def by_hand(batch):
    found = []
    for row in batch.documents_BS.tolist():
        seen = {}
        for document in row:
            found.append(seen.get(document, 0))
            seen[document] = found[-1] + 1
    return found


@pytest.mark.parametrize("seed", range(3))
def test_positions_count_within_documents(seed):
    batch = batch_of(seed)
    assert positions.positions(batch.documents_BS).flatten().tolist() == by_hand(batch)


def test_bins_are_fine_at_first_and_begin_at_powers_of_two():
    starts = positions.STARTS
    assert starts[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13]
    assert {2**power for power in range(25)} <= set(starts)
    assert all(a < b and b <= 1.3 * a + 1 for a, b in pairwise(starts))


def test_every_valid_token_is_in_the_bin_of_its_position():
    torch.manual_seed(0)
    model = Transformer(config_of())
    batches = [batch_of(3), batch_of(4)]
    result = evaluate(model, batches, ["main"], OneRank())
    sums = {}
    for batch in batches:
        with torch.no_grad():
            logp_TV = model.logits(batch.ids_BS, batch.documents_BS).flatten(0, 1).double().log_softmax(-1)
        labels, valid = batch.labels_BS.flatten().tolist(), batch.valid_BS.flatten().tolist()
        for t, (position, label, counts) in enumerate(zip(by_hand(batch), labels, valid)):
            if counts:
                start = max(s for s in positions.STARTS if s <= position)
                loss, tokens = sums.get(start, (0.0, 0))
                sums[start] = loss - logp_TV[t, label].item(), tokens + 1
    assert [(b.first, b.tokens) for b in result.by_position] == [(s, sums[s][1]) for s in sorted(sums)]
    for b in result.by_position:
        assert b.loss == pytest.approx(sums[b.first][0] / sums[b.first][1], rel=1e-5)
        assert b.first <= b.last and (b.last + 1 in positions.STARTS)
    mean = sum(b.loss * b.tokens for b in result.by_position) / result.tokens
    assert result.loss == pytest.approx(mean, rel=1e-6)
    assert result.metrics() == {
        "loss": result.loss,
        "perplexity": math.exp(result.loss),
        "ece": result.ece,
        "accuracy": result.accuracy,
        "tokens": sum(int(batch.valid_BS.sum()) for batch in batches),
    }
