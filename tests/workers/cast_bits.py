"""Run by tests/unit/test_model_casts.py in Triton's interpreter, on a CPU: the kernels' bits are those of plain torch.

TRITON_INTERPRET=1 python -m tests.workers.cast_bits
"""

import torch

from distill.model import cast_kernels, casts
from distill.model.fp8_format import BELOW, E4M3, E5M2


def same(found, expected, dtype):
    """Codes and scales bit by bit; of a NaN only that it is one."""
    codes, scale = found
    want = expected.codes.view(torch.uint8)
    is_nan = expected.codes.float().isnan()
    assert torch.equal(codes.view(dtype).float().isnan(), is_nan)
    assert torch.equal(codes[~is_nan], want[~is_nan])
    assert torch.equal(scale.view(torch.int32), expected.scale.view(torch.int32))


def hard_rows(rows, width):
    x = torch.randn(rows, width) * torch.logspace(-18, 18, rows)[:, None]
    x[0], x[1] = 0, 3e38
    x[2, 5], x[3, 5], x[4] = torch.nan, -torch.inf, 1e-40
    x[5, :9] = torch.logspace(-8, 0, 9)
    return x.bfloat16()


def main():
    torch.manual_seed(0)
    done = 0
    for dtype, below in BELOW.items():
        for width in (16, 144, 5000):
            x = hard_rows(19, width)
            same(cast_kernels.launch_rows(x, None, below), casts.rows(x, dtype), dtype)
        whole = casts.scale_of_all(x[6:], dtype)
        same(cast_kernels.launch_rows(x[6:], whole, below), casts.rows(x[6:], dtype, whole), dtype)
        x = hard_rows(205, 70)
        for each in (x, x.mT.contiguous(), torch.randn(2, 144, 48).bfloat16()):
            same(cast_kernels.launch_columns(each, None, None, below), casts.columns(each, dtype), dtype)
        ends_E = torch.tensor([16, 16, 160, 192], dtype=torch.int32)
        x = x[:192].clone()
        same(cast_kernels.launch_columns(x, ends_E, None, below), casts.columns_of_groups(x, ends_E, dtype), dtype)
        done += 8
    assert set(BELOW) == {E4M3, E5M2}
    print(f"{done} casts have the same bits")


if __name__ == "__main__":
    main()
