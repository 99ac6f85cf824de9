"""`arbllm peer MODEL OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def peer(
    model: DenseModel,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    method: Annotated[
        str, typer.Option(help="rtn, gptq, gptq-act-order or hqq and its bits: rtn-4, hqq-2.")
    ] = "gptq-3",
    calibration: CalibrationText = "c4",
    windows: Windows = 128,
    window_length: WindowLength = 2048,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Round MODEL by another method, to compare with: OUT is a dense checkpoint, its true bits are counted.

    The same calibration and the same loop over blocks as `arbllm quantize`.

    **Examples**

    `arbllm peer HuggingFaceTB/SmolLM2-135M smollm2-gptq-3 --method gptq-3`

    `arbllm peer model.gguf rounded --method rtn-4 --calibration builtin --windows 16`
    """
    with command(debug):
        from arbllm.evaluation.peers import quantize_peer
        from arbllm.progress import ProgressDisplay

        say("opening", model)
        with ProgressDisplay() as display:
            summary = quantize_peer(
                model,
                out,
                method,
                calibration=calibration,
                windows=windows,
                window_length=window_length,
                seed=seed,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                on_event=display,
            )
        if json:
            print_json(summary.to_dict())
            return
        print_facts(
            {
                "dense checkpoint": str(summary.path),
                "true bits a weight": f"{summary.true_bits_per_weight:.3f}",
                "mean output error": f"{summary.output_error:.4f}",
                "size if packed": format_bytes(summary.bytes_on_disk),
                "time": f"{summary.seconds:.0f} s",
                "peak memory": format_bytes(summary.peak_memory_bytes),
            }
        )
