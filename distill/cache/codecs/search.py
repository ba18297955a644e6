"""Ids at points of a row's running mass: what a sampled codec needs of the whole vocabulary.

All of it is in the integers of `fixed_point`, so from equal logits a CPU (`compiled`), a GPU (`search_kernels`) and
operations on tensors (`by_tensors`, for every other device) give equal ids. Shapes do not depend on what is found, so
no host waits for a device.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

from distill.cache.codecs import fixed_point
from distill.cache.codecs.findings import Findings

_HAS_TRITON = find_spec("triton") is not None
_CHUNK = 2**24
"""Weights that `by_tensors` makes at one time."""
_THREAD_WORK = 2**19
"""Weights that are worth a thread."""


def search(logits_TV: Tensor, lse_T: Tensor, points_TK: Tensor, low: float = 1.0, heads: int = 0) -> Findings:
    """Ids at `points_TK` of the running mass.

    Args:
        logits_TV: float32, contiguous.
        lse_T: log-sum-exp of each row; not finite where the row has NaN, +inf or nothing but -inf.
        points_TK: float64, ascending, in units of the row's mass.
        low: where there are heads, the points count the mass of all other ids.
        heads: most ids whose share can be `low`; 0: there are no heads.
    """
    finite_T = lse_T.isfinite()
    if logits_TV.device.type == "cpu":
        return _on_cpu(logits_TV, finite_T, points_TK, low, heads)
    if logits_TV.is_cuda and _HAS_TRITON:
        return Findings(*search_rows(logits_TV, finite_T, points_TK, low, heads))
    return by_tensors(logits_TV, finite_T, points_TK, low, heads)


@torch.library.custom_op("codistill::search_rows", mutates_args=())
def search_rows(
    logits_TV: Tensor, finite_T: Tensor, points_TK: Tensor, low: float, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Findings` of the kernels."""
    from distill.cache.codecs import search_kernels

    found = search_kernels.search(logits_TV, finite_T, points_TK, low, heads)
    return found.entropy_T, found.top_T, found.total_T, found.heads_TH, found.ids_TK


@search_rows.register_fake
def _(
    logits_TV: Tensor, finite_T: Tensor, points_TK: Tensor, low: float, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, top_T = len(logits_TV), logits_TV.new_empty(len(logits_TV))
    ids_TK = top_T.new_empty(points_TK.shape, dtype=torch.int32)
    return top_T, top_T.clone(), ids_TK.new_empty(tokens, dtype=torch.int64), ids_TK.new_empty(tokens, heads), ids_TK


def by_tensors(logits_TV: Tensor, finite_T: Tensor, points_TK: Tensor, low: float, heads: int) -> Findings:
    """`search` on any device, by operations on whole tensors."""
    tokens, vocab = logits_TV.shape
    size = max(1, _CHUNK // vocab)
    if tokens > size:
        parts = [
            by_tensors(logits_TV[rows], finite_T[rows], points_TK[rows], low, heads)
            for rows in (slice(t, t + size) for t in range(0, tokens, size))
        ]
        return Findings(*map(torch.cat, zip(*parts, strict=True)))
    bits = fixed_point.fraction_bits(vocab)
    top_T = logits_TV.amax(-1)
    weights_TV, spread_T = fixed_point.weights_and_spread(logits_TV, top_T[:, None], bits)
    weights_TV = weights_TV.masked_fill_(~finite_T[:, None], 0)
    total_T = weights_TV.sum(-1)
    limit_T1 = fixed_point.least_head(total_T, low)[:, None]
    values_TH, heads_TH = weights_TV.topk(heads, -1)
    heads_TH = torch.where(finite_T[:, None] & (values_TH >= limit_T1), heads_TH, -1).int()
    if heads:
        weights_TV = weights_TV.masked_fill_(weights_TV >= limit_T1, 0)
    running_TV = weights_TV.cumsum_(-1)
    points_TK = (points_TK * total_T.double()[:, None]).long()
    ids_TK = torch.searchsorted(running_TV, points_TK, right=True)
    ids_TK = torch.where(points_TK < running_TV[:, -1:], ids_TK, -1).int()
    return Findings(fixed_point.entropy(total_T, spread_T, bits), top_T, total_T, heads_TH, ids_TK)


def _on_cpu(logits_TV: Tensor, finite_T: Tensor, points_TK: Tensor, low: float, heads: int) -> Findings:
    from distill.cache.codecs import compiled  # loads numba, which a GPU does not need

    tokens, vocab = logits_TV.shape
    bits = fixed_point.fraction_bits(vocab)
    top_T = logits_TV.amax(-1)
    total_T, spread_T = torch.zeros(2, tokens, dtype=torch.int64)
    heads_TH = torch.full((tokens, heads), -1, dtype=torch.int32)
    ids_TK = torch.full(points_TK.shape, -1, dtype=torch.int32)
    arrays = [x.numpy() for x in (logits_TV, top_T, finite_T, points_TK, total_T, spread_T, heads_TH, ids_TK)]
    _in_threads(lambda rows: compiled.find(*(x[rows] for x in arrays), low, bits), tokens, vocab)
    return Findings(fixed_point.entropy(total_T, spread_T, bits), top_T, total_T, heads_TH, ids_TK)


def _in_threads(work: Callable[[slice], object], tokens: int, vocab: int) -> None:
    """Does slices of rows side by side, in as many threads as torch takes."""
    threads = max(1, min(torch.get_num_threads(), tokens, tokens * vocab // _THREAD_WORK))
    size = max(1, -(-tokens // threads))
    parts = [slice(t, t + size) for t in range(0, tokens, size)]
    if len(parts) < 2:
        for rows in parts:
            work(rows)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(work, parts))
