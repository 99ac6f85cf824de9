"""`arbllm inspect OUT`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arbllm.cli.options import Debug, Json
from arbllm.cli.output import command, format_bytes, print_facts, print_json, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from arbllm.format.accounting import StorageSize
    from arbllm.format.report import CheckpointReport, LinearReport


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="A packed checkpoint, as quantize wrote it.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a packed checkpoint stores, layer by layer, after checking every tensor against its checksum.

    **Examples**

    `arbllm inspect smollm2-packed`

    `arbllm inspect smollm2-packed --json`
    """
    with command(debug):
        from arbllm.format.report import report

        found = report(checkpoint)
        if json:
            print_json(found.to_dict())
            return
        stdout().print(layers(found))
        print_facts(totals(found))


def layers(found: CheckpointReport) -> Table:
    """One row a linear."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("linear")
    for title in ("shape", "salient", "columns by bits", "nominal bits", "true bits", "output error", "bytes"):
        table.add_column(title, justify="right")
    for linear in found.linears:
        table.add_row(
            linear.name,
            f"{linear.rows} x {linear.columns}",
            str(linear.salient),
            columns_by_bits(linear),
            f"{linear.nominal_bits:.3f}",
            f"{linear.true_bits:.3f}",
            "" if linear.output_error is None else f"{linear.output_error:.4f}",
            f"{linear.bytes:,}",
        )
    return table


def columns_by_bits(linear: LinearReport) -> str:
    """How many columns have how many bits a weight, signs and group number, as in `64x3b 512x2b`."""
    columns: dict[int, int] = {}
    for kind in linear.kinds:
        columns[kind.bits] = columns.get(kind.bits, 0) + kind.width
    return " ".join(f"{width}x{bits}b" for bits, width in columns.items())


def totals(found: CheckpointReport) -> dict[str, str]:
    """What the checkpoint holds as a whole."""
    packed, options, text = found.size.linears, found.binarization, found.calibration
    memory = found.size.linears_in_memory
    bits = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in packed.bits_per_weight.items() if value)
    return {
        "": "",
        "method": _method(options),
        "calibration": f"{text.get('windows')} windows of {text.get('window_length')} tokens of {text.get('text')}",
        "linears": f"{len(found.linears)} of {packed.weights:,} weights, {format_bytes(packed.nbytes)}",
        "nominal bits a weight": f"{packed.nominal_bits:.3f}",
        "true bits a weight": f"{packed.true_bits:.3f} ({bits})",
        **({} if memory == packed else {"in memory": _decoded(memory, found.bitmap)}),
        "mean output error": "" if found.output_error is None else f"{found.output_error:.4f}",
        "embeddings and head": format_bytes(found.size.embeddings)
        + (", in 8 bits" if found.rounded_embeddings else ""),
        "norms and biases": format_bytes(found.size.rest),
        "file": f"{format_bytes(found.bytes_on_disk)}, all checksums right",
    }


def _decoded(memory: StorageSize, bitmap: str) -> str:
    """What the linears take once their bitmaps are decoded."""
    return (
        f"{memory.true_bits:.3f} true bits a weight, {format_bytes(memory.nbytes)}: the file's bitmap is {bitmap}-coded"
    )


def _method(options: Mapping[str, Any]) -> str:
    """The method and the options that tell most about it."""
    if options.get("bits") is not None:
        return f"{options.get('method')}, at most {options['bits']:g} bits a weight"
    return f"{options.get('method')}, partition {options.get('partition')}, {options.get('groups')} groups"
