"""Targets of a frozen teacher of ours are those of each document alone; and the identity of a teacher."""

import numpy as np
import pytest
import torch

from distill.cache import CacheHeader, CacheReader, CacheWriter, make_codec
from distill.config.schema import CodecConfig
from distill.data.join import Batch, Joined
from distill.model import Transformer
from teacher.capture import Capture
from teacher.labelling import Own, label
from tests.unit.test_model_attention import config_of

S, V, SAMPLES = 12, 64, 5
DOCUMENTS = torch.tensor([[0] * 12, [0] * 3 + [1] * 9, [0] * 1 + [1] * 6 + [2] * 5], dtype=torch.int32)
IDS = np.array([4, 0, 2])


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(config_of(vocab_size=V)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


@pytest.fixture
def batch():
    tokens = torch.randint(V, (3, S + 1), generator=torch.Generator().manual_seed(1))
    valid_BS = torch.rand(3, S, generator=torch.Generator().manual_seed(2)) < 0.8
    return Batch(
        tokens[:, :-1], tokens[:, 1:], valid_BS, DOCUMENTS, IDS, np.zeros(3, np.int64), IDS.astype(np.uint64),
        *Joined.none(3),
    )  # fmt: skip


def alone(model, batch):
    """Log-probabilities [T, V] in fp64, each document by itself as a row without packing."""
    parts = []
    with torch.no_grad():
        for ids_S, documents_S in zip(batch.ids_BS, batch.documents_BS):
            for ordinal in documents_S.unique():
                parts.append(model.logits(ids_S[documents_S == ordinal][None])[0].double().log_softmax(-1))
    return torch.cat(parts)


def test_the_cache_holds_what_the_teacher_says_of_each_document(model, batch, tmp_path):
    codec = CodecConfig(name="topk", k=V)
    header = CacheHeader(vocab_size=V, tokenizer="t", corpus="c", sample_tokens=S, samples=SAMPLES, codec=codec, seed=3)
    made = dict(source="backfill", seen_before=True, flops_per_token=7.0)
    teacher = Own(model)
    with CacheWriter(tmp_path, header, writer="backfill-00000", **made) as writer:
        capture = Capture(make_codec(codec, V), [writer], 3, "frozen", lambda step: 1234)
        loss, valid = label(teacher, batch, 5, capture, step=41)
    want_TV, valid_T = alone(model, batch), batch.valid_BS.flatten()
    label_T = want_TV.gather(-1, batch.labels_BS.flatten()[:, None]).squeeze(-1)
    assert valid == valid_T.sum() and float(loss) == pytest.approx(-float(label_T[valid_T].sum()), rel=1e-5)
    assert label(teacher, batch, 5).tolist() == [pytest.approx(float(loss)), int(valid)]

    reader = CacheReader(tmp_path)
    found = reader.read(IDS, IDS.astype(np.uint64))
    assert (found.targets.covered_T == valid_T).all() and found.step_B.tolist() == [41] * 3
    dense_TV = torch.zeros(len(valid_T), V).scatter_add_(-1, found.targets.ids_TK, found.targets.probs_TK)
    # Within the codec's byte; a probability far below all others is kept as its least code.
    torch.testing.assert_close(dense_TV[valid_T], want_TV.exp().float()[valid_T], rtol=0.06, atol=1e-3)
    (origin,) = reader.summary
    assert (origin.teacher, origin.source, origin.tokens_seen, origin.seen_before) == ("frozen", "backfill", 1234, True)
    assert origin.loss == pytest.approx(-float(label_T[valid_T].mean()), rel=1e-5) and origin.flops_per_token == 7.0
    assert all(parameter.grad is None for parameter in model.parameters())
