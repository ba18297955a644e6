"""Rows of logits, and points of their mass, for the tests of a search."""

import torch


def hard_rows(tokens, vocab, scale):
    """Normal logits; the first rows have NaN, infinities, few ids or nothing."""
    logits_TV = scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(6))
    logits_TV[1, vocab // 2], logits_TV[2, 1:], logits_TV[3, 0], logits_TV[4] = (
        torch.nan,
        -torch.inf,
        torch.inf,
        -torch.inf,
    )
    if tokens > 6:
        logits_TV[5], logits_TV[6] = logits_TV[5] + 1e4, logits_TV[6] * 1e30
    return logits_TV


def CASES(tokens, vocab):
    """(points [T, K], low, heads): evenly spaced draws, and two of a threshold; a draw at 0 and one at the very end."""
    offset_T1 = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    drawn_TK = ((torch.arange(20) + offset_T1) / 20).clamp(max=1 - 2**-50)
    drawn_TK[-1, 0], drawn_TK[-1, -1] = 0.0, 1 - 2**-50
    cases = [(drawn_TK, 1.0, 0)]
    for tau in (0.05, 0.3):
        low = tau * (1 - 2**-16)
        points_TK = (torch.arange(int(1 / tau) + 2) + offset_T1) * tau
        cases.append((points_TK, low, min(vocab, int(1 / low))))
    return cases


def assert_same(found, other):
    """Bit for bit; heads in any order, and the greatest logit only where a row is finite."""
    finite_T = found.total_T > 0
    for name, one, two in zip(found._fields, found, other, strict=True):
        if name == "top_T":
            one, two = one[finite_T], two[finite_T]
        elif name == "heads_TH":
            one, two = one.sort(-1).values, two.sort(-1).values
        assert one.dtype == two.dtype and torch.equal(one.nan_to_num(-7.0), two.nan_to_num(-7.0)), name
