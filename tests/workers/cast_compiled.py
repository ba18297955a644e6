"""Run by tests/unit/test_model_casts.py without a GPU: compiles the kernels for an H100 and looks at the code.

python -m tests.workers.cast_compiled
"""

import re
from collections import Counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distill.model import cast_kernels as kernels

ROWS = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*i32", "rows": "i32", "width": "i32"}
COLUMNS = {**ROWS, "ends_ptr": "*i32", "padded": "i32", "by_group": "i32", "by_column": "i32"}


def code(kernel, signature, constants):
    """PTX of a kernel whose sizes and addresses are multiples of 16."""
    names = kernel.arg_names
    constants = constants | {"INTERPRETED": False}
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert made.asm["cubin"]
    return made.asm["ptx"]


def main():
    for below, name in ((8, "e4m3x2"), (15, "e5m2x2")):
        for given in (False, True):
            own = {"GIVEN": given, "BELOW": below}
            made = [code(kernels._rows_kernel, ROWS, own | {"ROWS": 1, "WIDTH": 8192})]
            for wide, tall in (kernels._OF_WEIGHTS, kernels._OF_ONE):
                cut = own | {"ROWS": tall, "WIDTH": wide, "GROUPED": False, "ends_ptr": None}
                made.append(code(kernels._columns_kernel, COLUMNS, cut))
            if not given:
                wide, tall = kernels._OF_GROUPS
                cut = own | {"ROWS": tall, "WIDTH": wide, "GROUPED": True, "by_group": 0}
                made.append(code(kernels._columns_kernel, COLUMNS, cut))
            for ptx in made:
                # To the nearest by the hardware; 16 bytes at a time but for scales.
                assert set(re.findall(r"cvt\.\S*e[45]m\S*", ptx)) == {f"cvt.rn.satfinite.{name}.f32"}, ptx
                access = Counter(re.findall(r"(ld|st)\.global\S*?(v4\.b32|b8|b16)\b", ptx))
                assert set(access) == {("ld", "v4.b32"), ("st", "v4.b32")}, access
    print("compiled")


if __name__ == "__main__":
    main()
