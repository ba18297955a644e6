"""Run by tests/unit/test_model_casts.py without a GPU: compiles the kernels for an H100 and looks at the code.

python -m tests.workers.cast_compiled
"""

import re
from collections import Counter

from distill.model import cast_kernels as kernels
from tests.workers.ptx import ptx_of

ROWS = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*i32", "rows": "i32", "width": "i32"}
COLUMNS = {**ROWS, "ends_ptr": "*i32", "padded": "i32", "by_group": "i32", "by_column": "i32"}


def main():
    for below, name in ((8, "e4m3x2"), (15, "e5m2x2")):
        for given in (False, True):
            own = {"GIVEN": given, "BELOW": below, "INTERPRETED": False}
            made = [ptx_of(kernels._rows_kernel, ROWS, own | {"ROWS": 1, "WIDTH": 8192}, num_warps=8)]
            for wide, tall in (kernels._OF_WEIGHTS, kernels._OF_ONE):
                cut = own | {"ROWS": tall, "WIDTH": wide, "GROUPED": False, "ends_ptr": None}
                made.append(ptx_of(kernels._columns_kernel, COLUMNS, cut, num_warps=8))
            if not given:
                wide, tall = kernels._OF_GROUPS
                cut = own | {"ROWS": tall, "WIDTH": wide, "GROUPED": True, "by_group": 0}
                made.append(ptx_of(kernels._columns_kernel, COLUMNS, cut, num_warps=8))
            for ptx in made:
                # To the nearest by the hardware; 16 bytes at a time but for scales.
                assert set(re.findall(r"cvt\.\S*e[45]m\S*", ptx)) == {f"cvt.rn.satfinite.{name}.f32"}, ptx
                access = Counter(re.findall(r"(ld|st)\.global\S*?(v4\.b32|b8|b16)\b", ptx))
                assert set(access) == {("ld", "v4.b32"), ("st", "v4.b32")}, access
    print("compiled")


if __name__ == "__main__":
    main()
