"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a local directory (dense or packed), or a .gguf file.")
]
DenseModel = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local directory, or a .gguf file.")]
CalibrationText = Annotated[
    str, typer.Option(help="c4, wikitext2 or ptb (from the hub), a text file, or builtin (needs no network).")
]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
WindowLength = Annotated[int, typer.Option(help="Tokens of a calibration window.")]
Seed = Annotated[int, typer.Option(help="Of the choice of calibration windows.")]
Context = Annotated[int, typer.Option(help="Tokens of a window of text.")]
MaxWindows = Annotated[int | None, typer.Option(help="Windows of each text at most.", show_default="all")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the GPU where there is one, else the CPU")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing directory.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run model code that comes with the checkpoint. Only from sources you trust."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
