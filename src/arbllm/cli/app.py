"""The application: the commands by name."""

from __future__ import annotations

from typing import Annotated

import typer

import arbllm
from arbllm.cli.ablate import ablate
from arbllm.cli.analyze import analyze
from arbllm.cli.compare import compare
from arbllm.cli.distill import distill
from arbllm.cli.evaluate import evaluate
from arbllm.cli.export import export
from arbllm.cli.generate import generate
from arbllm.cli.inspect import inspect
from arbllm.cli.peer import peer
from arbllm.cli.quantize import quantize
from arbllm.cli.verify import verify

app = typer.Typer(
    name="arbllm",
    help="Large language models at one to three true bits per weight.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"arbllm {arbllm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Large language models at one to three true bits per weight."""


app.command("quantize")(quantize)
app.command("distill")(distill)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("export")(export)
app.command("peer")(peer)
app.command("compare")(compare)
app.command("ablate")(ablate)
app.command("analyze")(analyze)
