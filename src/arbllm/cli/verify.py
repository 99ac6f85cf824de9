"""`arbllm verify OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arbllm.cli.options import Debug, Json
from arbllm.cli.output import command, format_bytes, print_facts, print_json


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="A packed checkpoint, as quantize wrote it.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a packed checkpoint whole, without loading it as a model.

    Headers, layouts, names, shapes and dtypes, the checksum of every tensor, column orders, coded bitmaps. The first
    fault found is named by file and tensor, and the exit code is 2.

    **Examples**

    `arbllm verify smollm2-packed`
    """
    with command(debug):
        from arbllm.format.checkpoint import bytes_on_disk, open_checkpoint

        found = open_checkpoint(checkpoint)
        found.verify_contents()
        values = {
            "path": str(checkpoint),
            "files": len(found.files),
            "tensors": len(found.tensors),
            "linears": len(found.layouts),
            "bytes_on_disk": bytes_on_disk(checkpoint),
        }
        if json:
            print_json({"sound": True, **values})
            return
        print_facts(
            {
                "checkpoint": f"{checkpoint}: sound",
                "tensors": f"{values['tensors']} in {values['files']} files, all as they were written",
                "packed linears": str(values["linears"]),
                "size on disk": format_bytes(bytes_on_disk(checkpoint)),
            }
        )
