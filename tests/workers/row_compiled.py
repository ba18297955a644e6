"""Run by tests/unit/test_losses_kernels.py without a GPU: compiles the row kernels for an H100 and looks at the code.

python -m tests.workers.row_compiled
"""

import re

from losses import kernels
from tests.workers.ptx import ptx_of

READ = {"logits": "*fp32", "labels": "*i64", "ids": "*i64", "numbers": "*fp32", "found": "*fp32"}
READ |= {"tokens": "i32", "width": "i32", "stride": "i32"}
WRITE = {"logits": "*fp32", "grads": "*bf16", "mosts": "*fp32", "logs": "*fp32", "labels": "*i64", "w_hards": "*fp32"}
WRITE |= {"ids": "*i64", "probs": "*fp32", "w_softs": "*fp32", "width": "i32", "stride": "i32", "grad_stride": "i32"}


def main():
    for atoms in (0, 8, 64):
        shape = {"ATOMS": atoms, "ROOM": max(atoms, 1)}
        depth, lanes, warps = kernels.READ
        ptx = ptx_of(kernels._read, READ, shape | {"DEPTH": depth, "LANES": lanes}, num_warps=warps)
        # The loop has no barrier: lanes go on alone until the row's end.
        loop = ptx[ptx.index("v4.b32") :].split("bra")[0]
        assert ptx.count("ld.global.v4.b32") * 4 * 32 * warps == depth * lanes and "bar.sync" not in loop
        depth, lanes, warps = kernels.WRITE
        ptx = ptx_of(kernels._write, WRITE, shape | {"BLOCK": depth * lanes}, num_warps=warps)
        wide = re.findall(r"ld\.global\.v4|bar\.sync|st\.global\.v4|st\.global\.b16", ptx[ptx.index("ld.global.v4") :])
        # All lanes have read a block before any writes; the label's and the atoms' numbers come after all blocks.
        kinds = [kind for kind, last in zip(wide, [None, *wide]) if kind != last]
        want = ["ld.global.v4", "bar.sync", "st.global.v4", "bar.sync", "st.global.b16"]
        assert kinds == want, kinds
    print("compiled")


if __name__ == "__main__":
    main()
