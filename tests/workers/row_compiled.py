"""Run by tests/unit/test_losses_kernels.py without a GPU: compiles the row kernels for an H100 and looks at the code.

python -m tests.workers.row_compiled
"""

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from losses import kernels

READ = {"logits": "*fp32", "labels": "*i64", "ids": "*i64", "numbers": "*fp32", "found": "*fp32"}
READ |= {"tokens": "i32", "width": "i32", "stride": "i32"}
WRITE = {"logits": "*fp32", "grads": "*bf16", "mosts": "*fp32", "logs": "*fp32", "labels": "*i64", "w_hards": "*fp32"}
WRITE |= {"ids": "*i64", "probs": "*fp32", "w_softs": "*fp32", "width": "i32", "stride": "i32", "grad_stride": "i32"}


def code(kernel, signature, constants, warps):
    """PTX of a kernel whose sizes and addresses are multiples of 16."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.asm["cubin"]
    return made.asm["ptx"]


def main():
    for atoms in (0, 8, 64):
        shape = {"ATOMS": atoms, "ROOM": max(atoms, 1)}
        depth, lanes, warps = kernels.READ
        ptx = code(kernels._read, READ, shape | {"DEPTH": depth, "LANES": lanes}, warps)
        # The loop has no barrier: lanes go on alone until the row's end.
        loop = ptx[ptx.index("v4.b32") :].split("bra")[0]
        assert ptx.count("ld.global.v4.b32") * 4 * 32 * warps == depth * lanes and "bar.sync" not in loop
        depth, lanes, warps = kernels.WRITE
        ptx = code(kernels._write, WRITE, shape | {"BLOCK": depth * lanes}, warps)
        wide = re.findall(r"ld\.global\.v4|bar\.sync|st\.global\.v4|st\.global\.b16", ptx[ptx.index("ld.global.v4") :])
        # All lanes have read a block before any writes; the label's and the atoms' numbers come after all blocks.
        kinds = [kind for kind, last in zip(wide, [None, *wide]) if kind != last]
        want = ["ld.global.v4", "bar.sync", "st.global.v4", "bar.sync", "st.global.b16"]
        assert kinds == want, kinds
    print("compiled")


if __name__ == "__main__":
    main()
