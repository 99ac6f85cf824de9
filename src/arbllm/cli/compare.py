"""`arbllm compare MODEL`."""

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
    Windows,
)
from arbllm.cli.output import command, print_json, say

METHODS = "fp16,rtn-4,gptq-4,gptq-3,gptq-2,hqq-4,hqq-2,hqq-1,billm,arb,arb-x,arb-rc,arb-rcx-2.25"


def compare(
    model: DenseModel,
    out: Annotated[Path, typer.Option(help="Directory of the comparison; a second run goes on where one stopped.")],
    methods: Annotated[
        str,
        typer.Option(
            help="With commas: fp16, rtn-B, gptq-B, gptq-act-order-B, hqq-B, billm, arb, arb-x, arb-rc, arb-rcx-BITS, "
            "alone or with -untuned or -distilled behind it."
        ),
    ] = METHODS,
    text: Annotated[str, typer.Option(help="Texts of perplexity, with commas; see eval.")] = "wikitext2",
    context: Context = 2048,
    max_windows: MaxWindows = None,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks, with commas; see eval.")] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' raw data sets.", show_default="from the hub")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task at most.", show_default="all")] = None,
    calibration: CalibrationText = "c4",
    windows: Windows = 128,
    window_length: WindowLength = 2048,
    seed: Seed = 0,
    distill_windows: Annotated[
        int | None,
        typer.Option(help="Windows that distilled methods read in the end.", show_default="as many as --windows"),
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the checkpoints.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods on MODEL at their true size: quantize, evaluate, and write a report.

    OUT receives results.json, report.html, which opens from the disk, and its pictures as PNGs.

    **Examples**

    `arbllm compare HuggingFaceTB/SmolLM2-135M --out comparison`

    `arbllm compare model.gguf --methods fp16,gptq-2,arb-rcx-2.25 --calibration wiki.valid.raw --out comparison`
    """
    with command(debug):
        from arbllm.evaluation.compare import compare as run
        from arbllm.evaluation.figures import require_matplotlib
        from arbllm.evaluation.methods import Calibration
        from arbllm.evaluation.protocol import Protocol
        from arbllm.evaluation.write_report import markdown, write_report

        out = out.expanduser()
        require_matplotlib()  # for the report, hours later
        protocol = Protocol(
            model,
            Calibration(calibration, windows, window_length, seed, device, dtype, trust_remote_code, distill_windows),
            tuple(names(text)),
            context,
            max_windows,
            tuple(names(tasks)),
            str(task_data.expanduser()) if task_data else None,
            limit,
        )
        results = run(
            protocol,
            names(methods),
            out,
            keep_models=keep_models,
            on_step=lambda method, step: say(f"[bold]{method}[/]", step),
        )
        page = write_report(results, out)
        if json:
            print_json(results)
            return
        typer.echo(markdown(results))
        say("report:", str(page))
