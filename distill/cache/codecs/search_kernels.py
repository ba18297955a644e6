"""`search` on a GPU: one kernel reads the logits twice, a second one reads the blocks that points fall into."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.cache.codecs import fixed_point
from distill.cache.codecs.findings import Findings

WIDTH = 128
"""Ids of a block."""
_TILE = 4096
"""Logits that a program takes at one time."""
_POINTS = 8
"""Points that a program looks for."""
EXACT = {"enable_fp_fusion": False}
"""Of every launch: fused, a product and a sum are rounded once, and not as everywhere else."""

_LOG2_E, _ROUND, _LN2_HIGH, _LN2_LOW, _C5, _C4, _C3, _C2, _C1, _C0, _LEAST = (
    tl.constexpr(getattr(fixed_point, name))
    for name in ("LOG2_E", "ROUND", "LN2_HIGH", "LN2_LOW", "C5", "C4", "C3", "C2", "C1", "C0", "LEAST")
)
_MANTISSA, _NATS = tl.constexpr(fixed_point.MANTISSA), tl.constexpr(fixed_point.NATS)
_ONES, _NAT_ONES = tl.constexpr(2.0**fixed_point.MANTISSA), tl.constexpr(-(2.0**fixed_point.NATS))


@triton.jit
def _split(below):  # type: ignore[no-untyped-def]
    """See `fixed_point`; int32."""
    below = tl.where(below > _LEAST, below, _LEAST)
    whole = (below * _LOG2_E + _ROUND) - _ROUND
    rest = (below - whole * _LN2_HIGH) - whole * _LN2_LOW
    value = rest * _C5 + _C4
    value = value * rest + _C3
    value = value * rest + _C2
    value = value * rest + _C1
    value = value * rest + _C0
    value = (value * (rest * rest) + rest) + 1.0
    return (value * _ONES).to(tl.int32), (-whole).to(tl.int32), (below * _NAT_ONES).to(tl.int32)


@triton.jit
def _weigh(logits_TV, top_T, mass_TB, spread_T, vocab, blocks, bits, WIDTH: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits_TV += row * vocab
    mass_TB += row * blocks
    offsets = tl.arange(0, TILE)
    greatest = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        logits = tl.load(logits_TV + start + offsets, mask=start + offsets < vocab, other=float("-inf"))
        greatest = tl.maximum(greatest, logits)
    top = tl.max(greatest, 0)
    spread = tl.zeros([TILE], tl.int64)
    for start in range(0, vocab, TILE):
        logits = tl.load(logits_TV + start + offsets, mask=start + offsets < vocab, other=float("-inf"))
        mantissa, shift, nats = _split(logits - top)
        weight = (mantissa.to(tl.int64) << (bits - _MANTISSA)) >> shift.to(tl.int64)
        spread += (mantissa.to(tl.int64) * nats.to(tl.int64)) >> (shift + (_MANTISSA + _NATS - bits)).to(tl.int64)
        mass = tl.sum(tl.reshape(weight, [TILE // WIDTH, WIDTH]), 1)
        block = start // WIDTH + tl.arange(0, TILE // WIDTH)
        tl.store(mass_TB + block, mass, mask=block < blocks)
    tl.store(top_T + row, top)
    tl.store(spread_T + row, tl.sum(spread, 0))


@triton.jit
def _locate(  # type: ignore[no-untyped-def]
    logits_TV,
    top_T,
    limit_T,
    block_TK,
    within_TK,
    ids_TK,
    vocab,
    bits,
    points,
    WIDTH: tl.constexpr,
    POINTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    asked = place < points
    block = tl.load(block_TK + row * points + place, mask=asked, other=0)
    within = tl.load(within_TK + row * points + place, mask=asked, other=0)
    column = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    logits = tl.load(logits_TV + row * vocab + column, mask=column < vocab, other=float("-inf"))
    mantissa, shift, _ = _split(logits - tl.load(top_T + row))
    weight = (mantissa.to(tl.int64) << (bits - _MANTISSA)) >> shift.to(tl.int64)
    weight = tl.where(weight < tl.load(limit_T + row), weight, 0)
    passed = tl.sum((tl.cumsum(weight, 1) <= within[:, None]).to(tl.int32), 1)
    tl.store(ids_TK + row * points + place, (block * WIDTH + passed).to(tl.int32), mask=asked)


def search(logits_TV: Tensor, finite_T: Tensor, points_TK: Tensor, low: float, heads: int) -> Findings:
    """See `search.search`."""
    (tokens, vocab), points = logits_TV.shape, points_TK.shape[1]
    bits, blocks = fixed_point.fraction_bits(vocab), triton.cdiv(vocab, WIDTH)
    top_T = torch.empty_like(logits_TV[:, 0])
    mass_TB = torch.empty(tokens, blocks, dtype=torch.int64, device=logits_TV.device)
    spread_T = torch.empty_like(mass_TB[:, 0])
    heads_TH = torch.full((tokens, heads), -1, dtype=torch.int32, device=logits_TV.device)
    ids_TK = torch.empty(tokens, points, dtype=torch.int32, device=logits_TV.device)
    if tokens:
        _weigh[(tokens,)](logits_TV, top_T, mass_TB, spread_T, vocab, blocks, bits, WIDTH, _TILE, num_warps=8, **EXACT)
    total_T = mass_TB.sum(-1).masked_fill_(~finite_T, 0)
    if heads:
        limit_T = fixed_point.least_head(total_T, low)
        logits_TH, found_TH = logits_TV.topk(heads)
        weights_TH = fixed_point.weights(logits_TH, top_T[:, None], bits)
        head_TH = (weights_TH >= limit_T[:, None]) & finite_T[:, None]
        heads_TH = torch.where(head_TH, found_TH, -1).int()
        mass_TB.scatter_add_(1, found_TH // WIDTH, -weights_TH * head_TH)
    else:
        limit_T = torch.full_like(total_T, 2**62)
    running_TB = mass_TB.cumsum_(-1)
    marks_TK = (points_TK * total_T.double()[:, None]).long()
    block_TK = torch.searchsorted(running_TB, marks_TK, right=True)
    inside_TK = (block_TK < blocks) & finite_T[:, None]
    before_TK = running_TB.gather(1, (block_TK - 1).clamp_(min=0)).masked_fill_(block_TK == 0, 0)
    if tokens and points:
        grid = (tokens, triton.cdiv(points, _POINTS))
        within_TK = marks_TK - before_TK
        _locate[grid](
            logits_TV, top_T, limit_T, block_TK, within_TK, ids_TK, vocab, bits, points, WIDTH, _POINTS, **EXACT
        )
    entropy_T = fixed_point.entropy(total_T, spread_T, bits)
    return Findings(entropy_T, top_T, total_T, heads_TH, ids_TK.masked_fill_(~inside_TK, -1))
