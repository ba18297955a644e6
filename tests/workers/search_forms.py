"""Run by tests/unit/test_cache_search.py, since Triton reads its variable when it is imported: the kernels of a search.

TRITON_INTERPRET=1 python -m tests.workers.search_forms interpreted
TRITON_INTERPRET=0 python -m tests.workers.search_forms compiled
"""

import re
import sys

from distill.cache.codecs import search_kernels as kernels
from distill.cache.codecs.findings import Findings
from distill.cache.codecs.search import search, search_rows
from tests.hard_rows import CASES, assert_same, hard_rows
from tests.workers.ptx import ptx_of

TYPES = {"logits_TV": "*fp32", "top_T": "*fp32", "ids_TK": "*i32"}
TYPES |= dict.fromkeys(("mass_TB", "spread_T", "limit_T", "block_TK", "within_TK"), "*i64")
TYPES |= dict.fromkeys(("vocab", "blocks", "bits", "points"), "i32")
FUSED = r"fma\.\S*f32"


def interpreted():
    for tokens, vocab, scale in ((6, 1, 1.0), (7, 203, 8.0), (7, 5001, 3.0)):
        logits_TV = hard_rows(tokens, vocab, scale)
        for points_TK, *heads in CASES(tokens, vocab):
            compare(logits_TV, points_TK, *heads)
    compare(
        hard_rows(7, 202_048, 3.0)[:1], *[part[:1] if i == 0 else part for i, part in enumerate(CASES(7, 202_048)[1])]
    )


def compare(logits_TV, points_TK, *heads):
    lse_T = logits_TV.logsumexp(-1)
    found = search_rows(logits_TV, lse_T.isfinite(), points_TK, *heads)
    assert_same(Findings(*found), search(logits_TV, lse_T, points_TK, *heads))


def compiled():
    assert re.search(FUSED, code(kernels._locate, 4, {"POINTS": kernels._POINTS}, enable_fp_fusion=True))
    for kernel, warps, sizes in (
        (kernels._weigh, 8, {"TILE": kernels._TILE}),
        (kernels._locate, 4, {"POINTS": kernels._POINTS}),
    ):
        exact = code(kernel, warps, sizes, **kernels.EXACT)
        assert not re.search(FUSED, exact)
        assert not re.search(r"(mul|add|sub)(\.ftz)?\.f32", exact), "an assembler may fuse what names no rounding"


def code(kernel, warps, sizes, **options):
    return ptx_of(kernel, TYPES, {"WIDTH": kernels.WIDTH, **sizes}, aligned=False, num_warps=warps, **options)


if __name__ == "__main__":
    {"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()
