"""What adapters learn beside the packed linears of a real model, and whether they are the same when loaded again.

    python benchmarks/adapters.py CHECKPOINT [--train FILE] [--text FILE] [--steps 48] [--windows 8] [--page]

Low-rank adapters (PEFT's LoRA) on all linears of the blocks learn from windows of a text, once each, in float32.
Perplexity is measured on another text: before, after, and with the written adapters on a packed model loaded anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import arbllm
from arbllm.device import peak_memory_bytes
from arbllm.integrations.peft import for_packed
from arbllm.model.perplexity import perplexity
from arbllm.nn import BinaryLinear
from arbllm.text import calibration_windows, evaluation_tokens
from eight_bits import shown
from kernels import machine
from sections import ROOT, write_section
from solver import Rows, as_markdown, as_table

PAGE = ROOT / "docs" / "finetuning.md"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 2  # windows of a step
LEARNING_RATE = 1e-3
HEADINGS = ("model", "perplexity")
COMMAND = "python benchmarks/adapters.py {checkpoint} --train {train} --text {text} --page"

_SECTION = """\
## On a real model

`{name}` and adapters of rank {rank} on all linears of its blocks, {steps} steps of AdamW on {batch} windows of
{length} tokens of {train_name} each; perplexity on the first {windows} windows of {context} tokens of
{text_name}.

{machine}

{table}

A step takes {seconds:.1f} s (median), the job {memory:.1f} GB at its peak. The adapters take {size:.1f} MB; packed
linears are bit for bit what they were.

`{command}` writes this section.
"""


class Outcome(NamedTuple):
    """Perplexities by model, seconds a step, MB of adapters, GB at most."""

    perplexities: dict[str, float]
    seconds: float
    size: float
    memory: float


def main() -> None:
    """Learn, print perplexities, and write them to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a packed model")
    parser.add_argument("--train", default="builtin", help="text to learn from, as for `arbllm quantize --calibration`")
    parser.add_argument("--text", default="builtin", help="text to measure on, as for `arbllm eval`")
    parser.add_argument("--steps", type=int, default=48, help=f"of {BATCH} windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window to learn from")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--windows", type=int, default=8, help="to measure on")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window to measure on")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/finetuning.md")
    options = parser.parse_args()
    outcome = experiment(options)
    rows: Rows = [(name, f"{found:.3f}") for name, found in outcome.perplexities.items()]
    console = Console()
    console.print(as_table(HEADINGS, rows))
    if options.page:
        section = _SECTION.format(
            **{**vars(options), **outcome._asdict()},
            name=Path(options.checkpoint).name, train_name=Path(options.train).name, text_name=Path(options.text).name,
            batch=BATCH, machine=machine(), table=as_markdown(HEADINGS, rows),
            command=COMMAND.format(
                checkpoint=options.checkpoint, train=shown(options.train), text=shown(options.text)
            ),
        )  # fmt: skip
        write_section(PAGE, "adapters", section)
        console.print(f"wrote {PAGE}")


def experiment(options: argparse.Namespace) -> Outcome:
    """Learn and measure; ends the program where learning has changed what is packed."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    lessons = calibration_windows(options.train, tokenizer, BATCH * options.steps, options.length)
    tokens = evaluation_tokens(options.text, tokenizer)

    def measured(model: PreTrainedModel) -> float:
        return perplexity(model, tokens, options.context, max_windows=options.windows).perplexity

    torch.manual_seed(0)
    packed = arbllm.load(options.checkpoint, dtype=torch.float32)
    before = measured(packed)
    config = for_packed(LoraConfig(r=options.rank, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model = get_peft_model(packed, config)
    seconds = learn(model, lessons)
    after = measured(model.get_base_model())
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        fresh = arbllm.load(options.checkpoint, dtype=torch.float32)
        if differing := changed(packed, fresh):
            sys.exit(f"learning changed packed linears: {', '.join(differing)}")
        config = for_packed(LoraConfig.from_pretrained(directory))
        again = measured(PeftModel.from_pretrained(fresh, directory, config=config).get_base_model())
    return Outcome(
        {"packed": before, "with adapters": after, "the same, loaded again": again},
        median(seconds),
        size / 1e6,
        peak_memory_bytes() / 1e9,
    )


def learn(model: PeftModel, lessons: Tensor) -> list[float]:
    """Learn, and return the seconds of every step; the rate rises over the first steps, then falls to nothing.

    Args:
        model: its adapters are changed in place.
        lessons: int64 (windows, length).
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    batches = lessons.split(BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, len(batches), pct_start=0.1)
    model.train()
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        print(f"step {len(seconds)}/{len(batches)}: loss {loss.item():.3f}, {seconds[-1]:.1f} s", flush=True)
    return seconds


def changed(model: PreTrainedModel, fresh: PreTrainedModel) -> list[str]:
    """Packed linears of a model that differ from those of the same name in another."""
    found = {name.replace(".base_layer", ""): module.matrix for name, module in linears(model).items()}
    return [
        name
        for name, module in linears(fresh).items()
        if any(not torch.equal(tensor, found[name].tensors()[key]) for key, tensor in module.matrix.tensors().items())
    ]


def linears(model: PreTrainedModel) -> dict[str, BinaryLinear]:
    """The packed linears of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


if __name__ == "__main__":
    main()
