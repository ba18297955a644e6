"""Casts to FP8: bits against a table of all codes, and the kernels against the same functions in plain torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from distill.model import casts
from distill.model.fp8_format import E4M3, E5M2


def values_of(dtype):
    """Of codes 0 to 127, as the format defines them; infinities and NaN left out."""
    mantissa, bias = (3, 7) if dtype is E4M3 else (2, 15)
    codes = np.arange(128 if dtype is E4M3 else 124)
    exponent, fraction = codes >> mantissa, (codes & (1 << mantissa) - 1) / (1 << mantissa)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    return values[:-1] if dtype is E4M3 else values


def nearest(x, dtype):
    """Codes of numbers within the range: to the nearest, ties to the even code."""
    table = values_of(dtype)
    size = np.abs(x)[:, None]
    # The middle between two neighbours is exact in fp64.
    above = size > (table[:-1] + table[1:]) / 2
    tie = size == (table[:-1] + table[1:]) / 2
    code = above.sum(1) + (tie & (np.arange(len(table) - 1) % 2 == 1)).sum(1)
    return code | np.signbit(x).astype(int) << 7


def spread(rows, width):
    x = torch.randn(rows, width) * torch.logspace(-20, 20, rows)[:, None]
    x[1, :7] = x[1, 0] * torch.logspace(-6, 0, 7)
    x[2] = 0
    return x.bfloat16()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_each_row_has_the_least_power_of_two_that_holds_it_and_the_nearest_codes(dtype):
    x = spread(40, 96)
    cast = casts.rows(x, dtype)
    largest, scale = x.double().abs().amax(1).numpy(), cast.scale.double().numpy()
    most = values_of(dtype)[-1]
    assert (np.log2(scale) % 1 == 0).all() and (largest <= most * scale).all()
    assert (largest > most * scale / 2)[scale > 2.0**-108].all()
    for row, s, codes in zip(x.double().numpy(), scale, cast.codes.view(torch.uint8).numpy()):
        assert (nearest(row / s, dtype) == codes).all()
    assert torch.equal(casts.value(cast), casts.value(cast).bfloat16().float())
    assert torch.equal(casts.value(cast), casts.value(casts.rows(casts.value(cast), dtype)))


def test_fp32_is_rounded_to_bf16_first_so_that_every_device_has_the_same_codes():
    x = torch.randn(64, 256)
    direct = (x / casts.rows(x).scale[:, None]).to(E4M3)
    assert torch.equal(casts.rows(x).codes.float(), casts.rows(x.bfloat16()).codes.float())
    assert 0.01 < (casts.rows(x).codes.float() != direct.float()).double().mean() < 0.06


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(bad):
    x = torch.randn(5, 32)
    x[3, 7] = bad
    by_row, by_column = casts.value(casts.rows(x)), casts.value(casts.columns(x))
    assert by_row[3].isnan().all() and by_row[[0, 1, 2, 4]].isfinite().all()
    assert by_column[7].isnan().all() and int(by_column.isnan().any(1).sum()) == 1
    assert casts.scale_of_all(x, E4M3).isnan()


def test_columns_are_rows_of_the_transpose_filled_up_with_zeros():
    x = torch.randn(3, 40, 24)
    cast, plain = casts.columns(x), casts.rows(x.mT)
    assert cast.codes.shape == (3, 24, 48) and cast.codes.is_contiguous()
    assert torch.equal(cast.codes[..., :40].float(), plain.codes.float()) and not cast.codes[..., 40:].float().any()
    assert torch.equal(cast.scale, plain.scale)
    whole = casts.columns(x[0], E4M3, casts.scale_of_all(x[0], E4M3))
    assert whole.scale.ndim == 0 and torch.equal(casts.value(whole)[:, :40].mT, casts.value(whole._replace(
        codes=casts.rows(x[0], E4M3, whole.scale).codes)))  # fmt: skip


def test_columns_of_groups_are_columns_of_each_group():
    x, ends = torch.randn(96, 24), [16, 16, 64, 96]
    x[20:64, 3] *= 1e4
    found = casts.columns_of_groups(x, torch.tensor(ends, dtype=torch.int32))
    assert found.codes.shape == (24, 96) and found.scale.shape == (4, 24)
    for e, (start, end) in enumerate(zip([0, *ends], ends)):
        if start < end:
            own = casts.columns(x[start:end])
            assert torch.equal(found.codes[:, start:end].float(), own.codes.float())
            assert torch.equal(found.scale[e], own.scale)
            assert torch.equal(casts.value(found)[:, start:end], casts.value(own))


def worker(name, **more):
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.workers.{name}"]
    return subprocess.run(command, env=kept | more, capture_output=True, text=True, timeout=300)


def test_the_kernels_give_the_same_bits():
    """In Triton's interpreter, which is chosen before Triton is imported."""
    found = worker("cast_bits", TRITON_INTERPRET="1")
    assert found.returncode == 0 and "16 casts" in found.stdout, found.stdout + found.stderr


def test_the_kernels_compile_for_an_h100_and_move_16_bytes_at_a_time(tmp_path):
    found = worker("cast_compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0 and "compiled" in found.stdout, found.stdout + found.stderr
