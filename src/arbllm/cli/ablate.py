"""`arbllm ablate MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arbllm.cli.evaluate import names
from arbllm.cli.options import (
    CalibrationText,
    Context,
    Debug,
    DenseModel,
    Device,
    Dtype,
    Json,
    MaxWindows,
    Seed,
    TrustRemoteCode,
    WindowLength,
)
from arbllm.cli.output import command, print_json, say


def ablate(
    model: DenseModel,
    out: Annotated[Path, typer.Option(help="Directory of the ablations; a second run goes on where one stopped.")],
    studies: Annotated[
        str | None,
        typer.Option(
            help="With commas: method, column-group bitmap, bitmaps, calibration windows, iterations, groups, block "
            "size, compensation, split on, arb-rcx; or how these begin.",
            show_default="all",
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="Texts of perplexity, with commas; see eval.")] = "wikitext2",
    context: Context = 2048,
    max_windows: MaxWindows = None,
    calibration: CalibrationText = "c4",
    windows: Annotated[int, typer.Option(help="Calibration windows; half and twice as many are tried, too.")] = 128,
    window_length: WindowLength = 2048,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Vary the paper's methods on MODEL one choice at a time, as in its Table 4, and arb-rcx likewise.

    OUT receives ablation.json and ablation.md.

    **Examples**

    `arbllm ablate HuggingFaceTB/SmolLM2-135M --out ablations`

    `arbllm ablate model.gguf --studies groups,iterations --calibration builtin --windows 8 --text builtin --out few`
    """
    with command(debug):
        from arbllm.evaluation.ablate import ablate as run
        from arbllm.evaluation.ablate import page
        from arbllm.evaluation.methods import Calibration
        from arbllm.evaluation.protocol import Protocol

        out = out.expanduser()
        protocol = Protocol(
            model,
            Calibration(calibration, windows, window_length, seed, device, dtype, trust_remote_code),
            tuple(names(text)),
            context,
            max_windows,
        )
        results = run(protocol, out, studies=names(studies), on_step=lambda name, step: say(f"[bold]{name}[/]", step))
        if json:
            print_json(results)
        else:
            typer.echo(page(results))
