"""The code that a kernel becomes on an H100, compiled without a GPU."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def ptx_of(kernel, types, constants, *, aligned=True, **options):
    """Text.

    Args:
        types: of arguments by name; others are not looked at.
        aligned: sizes and addresses are multiples of 16.
        options: of the launch, such as `num_warps`.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    sixteen = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=sixteen if aligned else None)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    return made.asm["ptx"]
