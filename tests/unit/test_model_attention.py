"""Runs of tokens, rotary positions and attention against a dense-mask fp64 oracle."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.config.schema import ModelConfig, RopeScaling
from distill.model import Segments, Transformer
from distill.model.rope import frequencies
from distill.model.segments import CALL, ROW
from tests.closeness import apart, worst


def config_of(**changes):
    sizes = dict(vocab_size=64, hidden_size=32, layers=4, heads=4, kv_heads=2, head_dim=8)
    sizes |= dict(expert_hidden=24, dense_hidden=48, experts=4, moe_step=2, chunk_size=8, floor_scale=4.0)
    return ModelConfig(**(sizes | dict(attn_scale=0.3, rope_theta=100.0, init_std=0.3) | changes))


def random_documents(rows, length, seed, rate=0.1):
    return (torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < rate).cumsum(1)


# ---------------------------------------------------------------- segments


def visible(plan, tokens):
    """Per token, the tokens that the plan lets it see, oldest first, and its position."""
    gather = plan.gather_P.tolist() if plan.gather_P is not None else list(range(tokens))
    scatter = plan.scatter_T.tolist() if plan.scatter_T is not None else list(range(tokens))
    run_of = []
    for runs, length in plan.blocks:
        run_of += [(len(run_of) + i // length * length) for i in range(runs * length)]
    position = plan.position_P.tolist()
    assert len(gather) == len(position) == len(run_of)
    return [([gather[j] for j in range(run_of[row], row + 1)], position[row]) for row in scatter]


@settings(max_examples=150)
@given(
    rows=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=3),
    chunk=st.one_of(st.none(), st.integers(1, 9)),
)
def test_plans_show_each_token_its_document_or_chunk(rows, chunk):
    width = max(map(sum, rows))
    rows = [lengths + [width - sum(lengths)] * (sum(lengths) < width) for lengths in rows]
    documents_BS = torch.tensor([[d for d, n in enumerate(lengths) for _ in range(n)] for lengths in rows])
    segments = Segments.build(documents_BS, chunk)
    full, chunked = [], []
    for row, lengths in enumerate(rows):
        start = row * width
        for length in lengths:
            for p in range(length):
                full.append((list(range(start, start + p + 1)), p))
                first = p // chunk * chunk if chunk else 0
                chunked.append((list(range(start + first, start + p + 1)), p - first))
            start += length
    assert visible(segments.full, documents_BS.numel()) == full
    assert visible(segments.chunked, documents_BS.numel()) == chunked


def test_whole_rows_are_one_call_and_move_nothing():
    for length, chunk, blocks in ((32, 8, (12, 8)), (32, None, (3, 32)), (5, 8, (3, 5))):
        plan = Segments.whole_rows(3, length, chunk).chunked
        assert plan.blocks == (blocks,) and plan.gather_P is None and plan.scatter_T is None


def test_padding_never_costs_more_than_a_call():
    documents_BS = random_documents(4, 700, seed=0, rate=0.01)
    lengths = sorted(n for row in documents_BS for n in row.unique_consecutive(return_counts=True)[1].tolist())
    blocks = Segments.build(documents_BS, None).full.blocks
    assert len(set(lengths)) > len(blocks) > 1
    for runs, longest in blocks:
        mine = [lengths.pop() for _ in range(runs)]
        assert mine[0] == longest and sum(longest**2 - n**2 + ROW * (longest - n) for n in mine) <= CALL


def test_decreasing_documents_are_refused():
    with pytest.raises(AssertionError, match="must not decrease"):
        Segments.build(torch.tensor([[1, 0]]), 8)


# ---------------------------------------------------------------- attention


def oracle_attention(layer, hidden_TD, documents_BS, config, rope):
    """Masked attention of one layer, token by token, in fp64 with complex rotations and absolute positions."""
    weight = {n: getattr(layer.self_attn, f"{n}_proj").weight.double() for n in "qkvo"}
    T, H, G, C = hidden_TD.shape[0], config.heads, config.kv_heads, config.head_dim
    q, k, v = ((hidden_TD.double() @ weight[n].T).reshape(T, -1, C) for n in "qkv")
    document = [(b, d) for b, row in enumerate(documents_BS.tolist()) for d in row]
    position = [sum(document[j] == document[t] for j in range(t)) for t in range(T)]
    if rope:
        angle = [[cmath.exp(1j * p * config.rope_theta ** (-2 * i / C)) for i in range(C // 2)] for p in position]
        turn = torch.tensor(angle, dtype=torch.complex128)[:, None]
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
        if config.qk_norm:
            q, k = (x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() for x in (q, k))
    elif config.temperature_tuning:
        factor = [1 + config.attn_scale * math.log(1 + (p + 1) // config.floor_scale) for p in position]
        q = q * torch.tensor(factor, dtype=torch.float64)[:, None, None]
    out = torch.zeros(T, H, C, dtype=torch.float64)
    for t in range(T):
        seen = [j for j in range(t + 1) if document[j] == document[t]]
        if rope and config.chunk_size:
            seen = [j for j in seen if position[j] // config.chunk_size == position[t] // config.chunk_size]
        for h in range(H):
            g = h // (H // G)
            share = (k[seen, g] @ q[t, h] / math.sqrt(C)).softmax(0)
            out[t, h] = share @ v[seen, g]
    return out.flatten(1) @ weight["o"].T


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk", [8, 5, None])
def test_attention_equals_the_masked_oracle(rope, packed, chunk):
    torch.manual_seed(3)
    config = config_of(chunk_size=chunk)
    model = Transformer(config)
    documents_BS = random_documents(2, 21, seed=4) if packed else torch.zeros(2, 21, dtype=torch.int64)
    plans = model.plans(Segments.build(documents_BS, chunk))
    layer = model.layers[0 if rope else 3]
    hidden_TD = torch.randn(42, 32)
    found = layer.self_attn(hidden_TD, plans[0 if rope else 1])
    expected = oracle_attention(layer, hidden_TD, documents_BS, config, rope)
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("high", [1.0, 4.0])
def test_llama3_frequencies(high):
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=high, original_positions=8192)
    found = frequencies(128, 500000.0, scaling).tolist()
    for i, value in enumerate(found):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / high:
            expected = plain
        elif wavelength > 8192 / 1.0:
            expected = plain / 16
        else:
            keep = (8192 / wavelength - 1.0) / (high - 1.0)
            expected = (1 - keep) * plain / 16 + keep * plain
        assert value == pytest.approx(expected, rel=1e-5), i
    if high == 1.0:  # the released Scout: a hard step after pair 34
        ratio = [f / 500000.0 ** (-2 * i / 128) for i, f in enumerate(found)]
        assert ratio[34] == pytest.approx(1, rel=1e-5) and ratio[35] == pytest.approx(1 / 16, rel=1e-5)


def test_a_wavelength_on_the_hard_step_is_finite():
    turns = (8192 / (2 * math.pi / torch.ones(1))).item()  # of the first pair, exactly
    assert frequencies(4, 100.0, RopeScaling(16.0, turns, turns, 8192)).isfinite().all()


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_equal_separate_runs(seed):
    torch.manual_seed(seed)
    model = Transformer(config_of())
    ids_BS = torch.randint(0, 64, (3, 40))
    documents_BS = random_documents(3, 40, seed)
    with torch.no_grad():
        packed = model.logits(ids_BS, documents_BS)
        for row in range(3):
            for document in documents_BS[row].unique():
                where = documents_BS[row] == document
                alone = model.logits(ids_BS[row, where][None])[0]
                assert worst(packed[row, where], alone) < 5e-5


@settings(max_examples=30)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 24, 25]), min_size=1, max_size=4), min_size=1, max_size=2
    ),
    seed=st.integers(0, 99),
)
def test_packing_around_chunk_borders_changes_nothing_but_roundings(rows, seed):
    torch.manual_seed(seed)
    model = Transformer(config_of(init_std=0.05, moe_step=1))  # logits of about 1
    width = max(map(sum, rows))
    rows = [lengths + [width - sum(lengths)] * (sum(lengths) < width) for lengths in rows]
    ids_BS = torch.randint(0, 64, (len(rows), width))
    documents_BS = torch.tensor([[d for d, n in enumerate(lengths) for _ in range(n)] for lengths in rows])
    packed_TV = model.logits(ids_BS, documents_BS).flatten(0, 1)
    documents = [ids_n for row, lengths in zip(ids_BS, rows) for ids_n in row.split(lengths)]
    alone_TV = torch.cat([model.logits(ids_n[None])[0] for ids_n in documents])
    assert worst(packed_TV, alone_TV) < 1e-5
    gradients = []
    for logits_TV in (packed_TV, alone_TV):
        model.zero_grad()
        F.cross_entropy(logits_TV, ids_BS.flatten(), reduction="sum").backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for packed, alone in zip(*gradients):
        assert apart(packed, alone, whole=gradients[1]) < 5e-6


def test_gradients_do_not_cross_documents_or_chunks():
    torch.manual_seed(0)
    config = config_of(nope_step=0)
    model = Transformer(config)
    table = torch.randn(1, 30, 32, requires_grad=True)
    model.embed.forward = lambda ids_T: table.flatten(0, 1)
    documents_BS = torch.tensor([[0] * 11 + [1] * 19])
    hidden_TD, _ = model(torch.zeros(1, 30, dtype=torch.int64), documents_BS)
    hidden_TD[22].sum().backward()  # position 11 of its document: chunk 1, which starts at token 19
    touched = table.grad[0].abs().sum(-1).nonzero().squeeze(1).tolist()
    assert touched == [19, 20, 21, 22]


# ---------------------------------------------------------------- length


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, backward included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_grows_faster_than_the_row(packed):
    model = Transformer(config_of(chunk_size=64, max_positions=4096))
    largest = {}
    for length in (512, 2048):
        documents_BS = (torch.arange(length)[None] >= length // 3).long() if packed else None
        with LargestTensor() as seen:
            hidden_TD, _ = model(torch.zeros(1, length, dtype=torch.int64), documents_BS)
            hidden_TD.sum().backward()
        largest[length] = seen.elements
    # A mask, or the scores of one head alone, would have 2048^2 elements.
    assert largest[2048] <= 4.1 * largest[512] and largest[2048] < 2048**2 / 16
