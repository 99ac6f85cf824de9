"""Compile every Triton kernel to machine code of an H100, which needs no GPU; print what of that GPU each uses."""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from arbllm.kernels import triton_matmul, triton_matvec

TYPES = {
    **dict.fromkeys(("x", "xs", "y", "dense"), "*bf16"),
    **dict.fromkeys(("norms", "sums", "partial"), "*fp32"),
    **dict.fromkeys(("row_scales", "column_scales"), "*u8"),
    **dict.fromkeys(("row_means", "steps", "z"), "*fp16"),
    **dict.fromkeys(("words", "singles"), "*i16"),
    **dict.fromkeys(("order", "run_table", "units", "single_columns", "counters"), "*i32"),
}
"""Of a matrix by arb-rcx; all other arguments are int32."""
FLAGS = {"SCALED": True, "CODES": True, "MEANS": False}
INPUTS = {"PARTS": 1, "MOST_TILES": 1, "TOKENS": 1, "N": 8}
CASES = (
    (triton_matvec.scale_inputs, {**FLAGS, **INPUTS, "SLICE": 8, "SPAN": 4}),
    (triton_matvec.few_tokens, {**FLAGS, **INPUTS, "KINDS": ((2, 1),), "SPLIT": True, "M": 64, "WORDS": 32}),
    (
        triton_matmul.many_tokens,
        {**FLAGS, "KINDS": ((2, 1),), "SPLIT": True, "PRECISION": "tf32", "TOKENS": 32, "M": 64, "WORDS": 16},
    ),
    (triton_matmul.dequantize, {**FLAGS, "KINDS": ((2, 1),), "M": 16}),
)


def compiled(kernel: Any, constants: dict[str, Any]) -> Any:
    """The kernel for compute capability 9.0, pointers being aligned as PyTorch's are."""
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})


INSTRUCTIONS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.f16": "bits on tensor cores",
    "wgmma.mma_async": "products of tiles",
    "cp.async.cg": "loads under way during products",
}

if __name__ == "__main__":
    found = {}
    for kernel, constants in CASES:
        binary = compiled(kernel, constants)
        assert binary.asm["cubin"]
        found[kernel.__name__] = [name for code, name in INSTRUCTIONS.items() if code in binary.asm["ptx"]]
    print(json.dumps(found))
