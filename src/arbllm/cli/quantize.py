"""`arbllm quantize MODEL OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arbllm.cli.options import (
    CalibrationText,
    Debug,
    DenseModel,
    Device,
    Dtype,
    Json,
    Overwrite,
    Seed,
    TrustRemoteCode,
    WindowLength,
    Windows,
)
from arbllm.cli.output import command, format_bytes, print_facts, print_json, say

if TYPE_CHECKING:
    from arbllm.plan import Plan

PAPER = "Methods of the paper"


def quantize(
    model: DenseModel,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    method: Annotated[str, typer.Option(help="arb-rcx, or as in the paper billm, arb, arb-x, arb-rc.")] = "arb-rcx",
    bits: Annotated[
        float | None,
        typer.Option(help="True bits a weight of the linears, 1.1 to 4, with arb-rcx.", show_default="2.25"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the weight files in all, for example 1.8GB or 95MB, in place of --bits.")
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="How linears share the bits: measured (by what the model gains) or uniform.")
    ] = "measured",
    trellis: Annotated[bool, typer.Option(help="Signs of a trellis code: less error with arb-rcx.")] = True,
    tune: Annotated[
        int | None,
        typer.Option(help="Steps of tuning each block's scales, 0 for none.", show_default="40 with arb-rcx, else 0"),
    ] = None,
    distill: Annotated[int, typer.Option(help="Steps of end-to-end distillation of the scales in the end.")] = 0,
    distill_windows: Annotated[
        int | None,
        typer.Option(help="Windows of the calibration text to distil on.", show_default="as many as --windows"),
    ] = None,
    calibration: CalibrationText = "c4",
    windows: Windows = 128,
    window_length: WindowLength = 2048,
    seed: Seed = 0,
    partition: Annotated[
        str,
        typer.Option(
            help="How weights share scales: none, column, group, column+group (BiLLM) or cgb (the paper).",
            rich_help_panel=PAPER,
        ),
    ] = "cgb",
    groups: Annotated[
        int, typer.Option(help="Groups of weights by size: 2 (1-bit bitmap) or 4 (2 bits).", rich_help_panel=PAPER)
    ] = 2,
    block_size: Annotated[int, typer.Option(help="Columns that share row scales.", rich_help_panel=PAPER)] = 128,
    iterations: Annotated[int, typer.Option(help="Alternating refinement steps.")] = 15,
    split_on: Annotated[
        str, typer.Option(help="Choose group thresholds by the weight or the saliency.", rich_help_panel=PAPER)
    ] = "weight",
    compensation: Annotated[
        str, typer.Option(help="How errors spread to later columns: exact or reference.", rich_help_panel=PAPER)
    ] = "exact",
    damping: Annotated[float, typer.Option(help="Added to the Hessian, in units of its mean diagonal.")] = 0.01,
    embeddings: Annotated[
        int, typer.Option(help="Bits of embeddings and head: 8, or 16 to leave them as they are.")
    ] = 16,
    bitmap: Annotated[
        str,
        typer.Option(help="How files hold the group bitmap: raw, entropy (smaller), or csr (as in the paper; larger)."),
    ] = "raw",
    evaluate: Annotated[
        str | None, typer.Option(help="Afterwards, measure perplexity on this text (as in eval) for the model card.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the weights block by block: a local model larger than memory.")
    ] = False,
    offload_dir: Annotated[
        Path | None, typer.Option(help="A directory for the calibration windows' activations, instead of memory.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what the job would take and make, from shapes alone, and stop.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Binarize MODEL into the packed checkpoint OUT.

    **Examples**

    `arbllm quantize HuggingFaceTB/SmolLM2-135M smollm2-packed`

    `arbllm quantize model.gguf packed --bits 1.6 --calibration builtin --windows 16`

    `arbllm quantize meta-llama/Llama-2-7b-hf packed --size 2.4GB --embeddings 8`

    `arbllm quantize meta-llama/Llama-2-7b-hf packed --method arb-x --device cuda`

    `arbllm quantize ./llama-70b packed --stream --offload-dir /scratch`

    `torchrun --nproc-per-node 8 -m arbllm quantize ./llama-70b packed --stream`

    A job that was stopped goes on where it was when the same command is given again.

    As the paper's own code: `--method arb-rc --split-on saliency --compensation reference`
    """
    with command(debug):
        from arbllm.config import BinarizationConfig
        from arbllm.errors import ConfigError
        from arbllm.model.ranks import is_first_process
        from arbllm.pipeline import quantize as run
        from arbllm.plan import plan
        from arbllm.progress import ProgressDisplay

        if bits is not None and size is not None:
            raise ConfigError("--bits and --size choose the same; leave one of them out")
        config = BinarizationConfig(
            method=method,
            bits=bits,
            allocation=allocation,
            trellis=trellis,
            partition=partition,
            groups=groups,
            block_size=block_size,
            iterations=iterations,
            split_on=split_on,
            compensation=compensation,
            damping=damping,
        )
        if dry_run:
            if size is not None:
                raise ConfigError("--dry-run tells the size that --bits lead to; leave out --size")
            found = plan(
                model,
                out,
                config=config,
                embedding_bits=embeddings,
                bitmap=bitmap,
                tune=tune,
                distill=distill,
                distill_windows=distill_windows,
                windows=windows,
                window_length=window_length,
                dtype=dtype,
                stream=stream,
                trust_remote_code=trust_remote_code,
            )
            _print_plan(found, json)
            return
        if is_first_process():
            say("opening", model)
        with ProgressDisplay() as display:
            summary = run(
                model,
                out,
                config=config,
                embedding_bits=embeddings,
                bitmap=bitmap,
                size=size,
                tune=tune,
                distill=distill,
                distill_windows=distill_windows,
                calibration=calibration,
                windows=windows,
                window_length=window_length,
                seed=seed,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                stream=stream,
                offload_dir=offload_dir,
                evaluate=evaluate,
                on_event=display,
            )
        if not is_first_process():
            return
        if json:
            print_json(summary.to_dict())
            return
        facts = {
            "checkpoint": str(summary.path),
            "true bits a weight": f"{summary.true_bits_per_weight:.3f}",
            "nominal bits a weight": f"{summary.nominal_bits_per_weight:.3f}",
            "mean output error": f"{summary.output_error:.4f}",
            "size on disk": format_bytes(summary.bytes_on_disk),
            "time": f"{summary.seconds:.0f} s",
            "peak memory": format_bytes(summary.peak_memory_bytes),
        }
        if summary.perplexity is not None:
            facts[f"perplexity, {evaluate}"] = f"{summary.perplexity:.2f}"
        print_facts(facts)
        typer.echo(f'\nTry it: arbllm generate {summary.path} "Once upon a time"')


def _print_plan(found: Plan, json: bool) -> None:
    """What `--dry-run` tells."""
    if json:
        print_json(found.to_dict())
        return
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in found.memory.items())
    print_facts(
        {
            "linears": f"{found.linears} in {found.blocks} blocks, {found.weights:,} weights",
            "true bits a weight": f"at most {found.true_bits_per_weight:.3f}",
            "size of the result": f"at most {format_bytes(found.result_bytes)}",
            "peak memory": f"about {format_bytes(found.peak_memory_bytes)}, at stage {found.stage} ({parts})",
            "time": "not known before a block is done: start the job, and ask again"
            if found.seconds is None
            else f"about {found.seconds:.0f} s, as long as the finished blocks of the unfinished job took",
        }
    )
