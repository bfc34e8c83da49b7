"""Every kernel compiled for GPUs that need not be there, with some of what it may be specialised for (`PASSES`): a program
of `test_compiled_kernels`, given the package's folder.
"""

from __future__ import annotations

import re
import sys
import types

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


# Without the package's own imports, which take longer than all the rest.
sys.modules["peft_dst"] = types.ModuleType("peft_dst")
sys.modules["peft_dst"].__path__ = sys.argv[1:]

from peft_dst.core import correction_triton, kernels_triton  # noqa: E402


TYPES = {
    **dict.fromkeys(("table", "tensors", "indices", "slots", "marked_tensor", "marked_block"), "*i64"),
    **dict.fromkeys(("tile_tensor", "tensor_group", "tensor_wide", "marked_bound", "maxima"), "*i32"),
    **dict.fromkeys(("distances", "found", "new"), "*i32"),
    **dict.fromkeys(("scalars", "values", "seeds", "masters"), "*fp32"),
    **dict.fromkeys(("groups_outputs", "starts", "groups_columns", "inputs"), "*i64"),
    **dict.fromkeys(("count", "sums", "columns", "entries", "rows", "width_out", "width_in"), "i32"),
}
# Distance, dtypes of gradient and weight, divisible into 16 bytes or not, components a block, GPU.
PASSES = [
    ("inverse_relative", "bfloat16", "bfloat16", True, 64, 90),
    ("relative", "float32", "float32", True, 8, 80),
    ("absolute", "float16", "float16", False, 1024, 80),
    ("inverse_relative", "float32", "bfloat16", False, 8, 90),
]


def compiled(kernel, capability: int, warps: int = 4, constants=None, **others: str) -> str:
    """The code of a kernel, as `kernels` has it compiled; `others` are types of its arguments."""
    constants, names = constants or {}, kernel.arg_names
    signature = {name: "constexpr" if name in constants else {**TYPES, **others}[name] for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def check_rounding(code: str) -> None:
    assert "fma." not in code, "a product and a sum were fused"
    assert ".ftz" not in code, "subnormal numbers are flushed"
    assert "approx" not in code, "an operation is approximated"
    assert "sqrt.rn.f32" in code, "a root is not rounded"
    assert "div.rn.f32" in code, "a quotient is not rounded"


for kind, grads, weights, aligned, block, capability in PASSES:
    own = {"KIND": kind, "WEIGHTS": weights, "ALIGNED": aligned, "BLOCK": block}
    first = compiled(kernels_triton.adamw_maxima, capability, constants={**own, "GRADS": grads, "ROWS": 2048 // block})
    check_rounding(first)
    for access in ("ld", "st"):
        assert bool(re.search(rf"{access}\.global\.v4", first)) == aligned, f"width of {access}"
    warps = 1 if block <= 256 else 4
    check_rounding(compiled(kernels_triton.candidates, capability, warps, {**own, "GROUP": 0}))
    check_rounding(compiled(kernels_triton.incumbents, capability, constants={"KIND": kind}))
for capability in (80, 90):
    compiled(kernels_triton.read_weights, capability)
    compiled(kernels_triton.write_weights, capability)
for dtype, exact in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
    like = {"output": f"*{dtype}", "input": f"*{dtype}", "differences": f"*{exact}"}
    compiled(correction_triton._correct, 80, constants={"LANES": correction_triton.LANES}, **like)
