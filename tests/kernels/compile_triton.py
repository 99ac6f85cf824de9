"""Compile the Triton kernels to machine code of an H100, as real calls ask for them: the compiler alone does it.

No GPU is needed.

Prints as JSON, for each kernel, which of the instructions below it has, and how many times it was compiled. Launches do
nothing, so results are not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import triton_configuration, triton_layout, triton_products, triton_rows
from arbllm.kernels.triton_configuration import Configuration
from tests.kernels.triton_matrices import MATRICES, in_segments

INSTRUCTIONS = {
    ".s32.s8.s8": "bytes on tensor cores",
    "dp4a.s32.s32": "four bytes at a time",
    "cp.async.c": "loads under way during products",
}
PLAIN = ((480, 2, 1), (96, 1, 2), *[(1, 1, 1)] * 16)
TRELLIS = ((480, 1, 2, True), (96, 1, 3, True), *[(1, 1, 1)] * 16)


def compile_only(found: dict[str, dict[str, Any]]) -> Callable[[Any, Any], Callable[..., None]]:
    """What takes the place of `kernel[grid]`."""

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            assert compiled.asm["cubin"]
            code = compiled.asm["ptx"]
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
            facts = found.setdefault(name, {"variants": []})
            facts.setdefault("means", list(INSTRUCTIONS.values()))
            facts["means"] = [name for text, name in INSTRUCTIONS.items() if text in code and name in facts["means"]]
            assert takes_words(compiled.asm["ttgir"])
            if compiled.hash not in facts["variants"]:
                facts["variants"].append(compiled.hash)

        return launch

    return launcher


def takes_words(code: str) -> bool:
    """Whether the four bytes that assembly takes as one register are those of a word, four columns of a row."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    results = [line.rpartition("->")[2] for line in code.splitlines() if "packed_element = 4" in line]
    layouts_of_results = [re.findall(r"i8, (#[\w.]+(?:<[^>]*>)?)>", result)[0] for result in results]
    return all(
        "kWidth = 4" in layout or "register = [[0, 1], [0, 2]" in layouts.get(layout, "")
        for layout in layouts_of_results
    )


def compile_all(default: Configuration) -> None:
    """The kernels for two sizes each, with all numbers of signs, groups and means, beginning early."""
    few, many = replace(default.few, most_tokens=1), replace(default.many, most_tokens=2)
    launch = replace(default, few=few, many=many)
    for rows, columns in ((256, TRELLIS), (112, TRELLIS[:2]), (256, PLAIN), (112, PLAIN[:2])):
        multiply_all(in_segments(rows, *columns), launch)
    early = replace(launch, few=replace(few, early=True), many=replace(many, early=True))
    multiply_all(in_segments(250, (61, 1, 1, True), (30, 1, 4, True), (1, 1, 1), scale_bits=16), early)
    for name in ("codes of rows and means", "arb-rc"):
        multiply_all(MATRICES[name](), early)


def multiply_all(matrix: BinaryMatrix, launch: Configuration) -> None:
    """One token, two, and three, which `launch` has different kernels for, and one in float32."""
    prepared = triton_layout.prepare(matrix)
    for tokens, dtype in ((1, torch.bfloat16), (2, torch.bfloat16), (3, torch.bfloat16), (1, torch.float32)):
        x = torch.zeros(tokens, matrix.layout.columns, dtype=dtype)
        triton_products.multiply(x, prepared, launch)


if __name__ == "__main__":
    found: dict[str, dict[str, Any]] = {}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    KernelInterface.__getitem__ = compile_only(found)
    compile_all(triton_configuration.load("any"))
    for dtype in (torch.bfloat16, torch.float32):
        codes, scales = torch.zeros(100, 576, dtype=torch.int8), torch.zeros(100, dtype=torch.float16)
        triton_rows.multiply(torch.zeros(1, 576, dtype=dtype), codes, scales)
    print(json.dumps(found))
