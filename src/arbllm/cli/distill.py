"""`arbllm distill OUT DISTILLED`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arbllm.cli.options import Debug, Device, Json, Overwrite, TrustRemoteCode
from arbllm.cli.output import command, print_facts, print_json, say

AS_BEFORE = "as OUT was calibrated"


def distill(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="A packed checkpoint by arb-rc or arb-rcx.")],
    distilled: Annotated[Path, typer.Argument(metavar="DISTILLED", help="The directory to write.")],
    model: Annotated[
        str, typer.Option(help="What OUT was quantized from: a hub id, a local directory or a .gguf file.")
    ],
    steps: Annotated[int, typer.Option(help="Steps of Adam, one piece of 512 tokens each.")] = 128,
    calibration: Annotated[
        str | None, typer.Option(help="c4, wikitext2, ptb, a text file, or builtin.", show_default=AS_BEFORE)
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of text.", show_default=AS_BEFORE)] = None,
    window_length: Annotated[int | None, typer.Option(help="Tokens of a window.", show_default=AS_BEFORE)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of windows.", show_default=AS_BEFORE)] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Distil the scales and norms of a packed checkpoint from the dense model, as quantize --distill does in the end.

    To try how many steps pay, or to go on where the divergence still fell. Signs, groups and size stay as they are.

    **Examples**

    `arbllm distill smollm2-packed smollm2-distilled --model HuggingFaceTB/SmolLM2-135M`

    `arbllm distill packed distilled --model model.gguf --steps 512 --calibration text.txt`
    """
    with command(debug):
        from arbllm.distillation import distill as run
        from arbllm.progress import ProgressDisplay

        say("opening", str(checkpoint))
        with ProgressDisplay() as display:
            summary = run(
                checkpoint,
                distilled,
                model=model,
                steps=steps,
                calibration=calibration,
                windows=windows,
                window_length=window_length,
                seed=seed,
                device=device,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                on_event=display,
            )
        if json:
            print_json(summary.to_dict())
            return
        print_facts(
            {
                "checkpoint": str(summary.path),
                "divergence before": f"{summary.divergence_before:.4f} nats a token on held-out text",
                "divergence after": f"{summary.divergence_after:.4f}, of step {summary.steps}",
                "time": f"{summary.seconds:.0f} s",
            }
        )
        typer.echo(f'\nTry it: arbllm generate {summary.path} "Once upon a time"')
