"""`arbllm analyze MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arbllm.cli.options import (
    CalibrationText,
    Debug,
    DenseModel,
    Dtype,
    Json,
    Seed,
    TrustRemoteCode,
    WindowLength,
    Windows,
)
from arbllm.cli.output import command, print_json, say


def analyze(
    model: DenseModel,
    out: Annotated[Path, typer.Option(help="Directory of the page, its picture and its figures.")],
    linear: Annotated[
        str | None,
        typer.Option(help="The linear to try every method on.", show_default="the one whose columns differ most"),
    ] = None,
    calibration: CalibrationText = "c4",
    windows: Windows = 8,
    window_length: WindowLength = 1024,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how much the columns of MODEL's weights differ, which is what column scales are for.

    OUT receives column-deviation.md, .png and .json.

    **Examples**

    `arbllm analyze HuggingFaceTB/SmolLM2-135M --out docs`

    `arbllm analyze model.gguf --calibration builtin --linear model.layers.4.mlp.down_proj --out analysis`
    """
    with command(debug):
        from arbllm.evaluation.analyze import analyze_model, compare_methods, most_columnar
        from arbllm.evaluation.write_analysis import prepare_output, to_dict, write_analysis
        from arbllm.model.source import open_model
        from arbllm.text import calibration_windows

        out = out.expanduser()
        prepare_output(out)
        say("opening", model)
        opened, tokenizer = open_model(model, dtype, trust_remote_code=trust_remote_code)
        tokens = calibration_windows(calibration, tokenizer, windows, window_length, seed)
        linears = analyze_model(opened)
        chosen = linear or most_columnar(linears).name
        say("methods on", chosen)
        weight, remainders = compare_methods(opened, chosen, tokens)
        read = f"{len(tokens)} windows of {window_length} tokens of {Path(calibration).name}"
        text = write_analysis(Path(model).name, linears, chosen, read, weight, remainders, out)
        if json:
            print_json(to_dict(Path(model).name, linears, chosen, read, remainders))
        else:
            typer.echo(text)
