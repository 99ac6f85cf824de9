"""`arbllm export OUT DENSE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arbllm.cli.options import Debug, Dtype, Json, Overwrite, TrustRemoteCode
from arbllm.cli.output import command, format_bytes, print_facts, print_json


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="OUT", help="A packed checkpoint, as quantize wrote it, or a .gguf file.")
    ],
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The directory to write.")],
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint as an ordinary one, weights dequantized, for any other engine.

    A .gguf file, too: transformers takes half a minute to open one, each time.

    **Examples**

    `arbllm export smollm2-packed smollm2-dense`

    `arbllm export smollm2-packed smollm2-dense --dtype bfloat16 --overwrite`

    `arbllm export SmolLM2-135M-Instruct.Q4_1.gguf smollm2`
    """
    with command(debug):
        from arbllm.export import export as run
        from arbllm.format.checkpoint import bytes_on_disk
        from arbllm.measure import measure

        with measure() as measured:
            run(checkpoint, dense, dtype=dtype, overwrite=overwrite, trust_remote_code=trust_remote_code)
        size = bytes_on_disk(dense)
        if json:
            print_json({"path": str(dense), "bytes_on_disk": size, **measured.to_dict()})
        else:
            print_facts(
                {
                    "dense checkpoint": str(dense),
                    "size on disk": format_bytes(size),
                    "time": f"{measured.seconds:.0f} s",
                }
            )
