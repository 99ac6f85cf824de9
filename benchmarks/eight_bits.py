"""What the CPU kernel's rounding does to perplexity: a packed model reads text a few tokens at a time, as it decodes.

    python benchmarks/eight_bits.py CHECKPOINT [--text FILE] [--windows 4] [--window-length 512] [--page]

Products of few tokens come from tables or activations rounded to 8 bits, unless `BinaryLinear.exact` says that they be
in float32; those of more come in bfloat16 if PyTorch's precision of float32 is "medium". Every window is read exactly,
as many tokens at a time with a cache as come in 8 bits, one by one, and as a whole in bfloat16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import arbllm.integrations.transformers  # noqa: F401  so that transformers knows packed models
from arbllm.device import float32_precision
from arbllm.kernels.cpu import instruction_sets, most_tokens, native_module
from arbllm.model.perplexity import cut_windows
from arbllm.nn import BinaryLinear
from arbllm.text import evaluation_tokens
from kernels import machine
from results import DATA
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

HEADINGS = ("products", "perplexity", "change")
COMMAND = "python benchmarks/eight_bits.py {checkpoint} --text {text} --windows {windows} --page"

_SECTION = """\
## What 8 bits do to perplexity with {kernel}

`{name}`, at {bits:.2f} bits, reads {windows} windows of {length} tokens of {text} with a cache, all products of
packed linears in float32, or all from tables or activations of 8 bits, {together} tokens at a time or one, or whole
windows at a time in bfloat16, as `torch.set_float32_matmul_precision("medium")` has it.

{machine}

{table}

`{command}` writes this section.
"""


def main() -> None:
    """Print both perplexities, and write them to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a packed model")
    parser.add_argument("--text", default="builtin", help="a name or file, as for `arbllm eval`")
    parser.add_argument("--windows", type=int, default=4, help="to read")
    parser.add_argument("--window-length", type=int, default=512, help="tokens of each")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    tokens = evaluation_tokens(options.text, tokenizer)
    windows = cut_windows(model, tokens, options.window_length, options.windows)
    console = Console()
    together = most_tokens()
    exact = perplexity(model, windows, together, exact=True)
    rows: Rows = [("float32", f"{exact:.3f}", "")]
    ways = {f"8 bits, {together} tokens at a time": together, "8 bits, one token at a time": 1}
    if native_module().MULTIPLIES_BFLOAT16 and options.window_length > together:
        ways["bfloat16, a window at a time"] = options.window_length
    for way, count in ways.items():
        with float32_precision("medium" if count > together else "highest"):
            rounded = perplexity(model, windows, count, exact=False)
        rows.append((way, f"{rounded:.3f}", f"{rounded / exact - 1:+.2%}"))
    console.print(as_table(HEADINGS, rows))
    if options.page:
        linears = [module.matrix for module in model.modules() if isinstance(module, BinaryLinear)]
        weights = sum(matrix.layout.rows * matrix.layout.columns for matrix in linears)
        name, text, kernel = Path(options.checkpoint).name, Path(options.text).name, instruction_sets()[0]
        section = _SECTION.format(
            bits=8 * sum(matrix.nbytes for matrix in linears) / weights, windows=len(windows),
            length=options.window_length, name=name, kernel=kernel, text=text, together=together, machine=machine(),
            table=as_markdown(HEADINGS, rows),
            command=COMMAND.format(checkpoint=options.checkpoint, text=shown(options.text), windows=len(windows)),
        )  # fmt: skip
        write_section(PERFORMANCE, f"8 bits with {kernel}", section)
        console.print(f"wrote {PERFORMANCE}")


def shown(text: str) -> str:
    """A text as an option that others can give as well: files among the evaluation data by where those are."""
    path = Path(text)
    return f"$ARBLLM_DATA/{DATA.name}/{path.name}" if path.resolve().parent == DATA.resolve() else text


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor, together: int, *, exact: bool) -> float:
    """Perplexity over windows (N, L), so many tokens at a time."""
    BinaryLinear.exact = exact
    total = 0.0
    for window in windows:
        cache = None
        for start in range(0, len(window) - 1, together):
            stop = min(start + together, len(window) - 1)
            output = model(input_ids=window[None, start:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            total += cross_entropy(output.logits[0].float(), window[start + 1 : stop + 1], reduction="sum").item()
    return math.exp(total / (windows.numel() - len(windows)))


if __name__ == "__main__":
    main()
