"""`arbllm eval MODEL`."""

from __future__ import annotations

from typing import Annotated

import typer

from arbllm.cli.options import Debug, Device, Dtype, Json, Model, TrustRemoteCode
from arbllm.cli.output import command, format_bytes, print_facts, print_json, say


def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option(help="wikitext2, ptb or c4 (from the hub), a text file, or builtin.")
    ] = "wikitext2",
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.", show_default="all")] = None,
    skip_windows: Annotated[int, typer.Option(help="Leave out so many windows first: a text in pieces.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of MODEL, dense or packed.

    The usual protocol: the text joined, tokenised once, cut into windows that do not overlap. On a CPU in float32.

    **Examples**

    `arbllm eval smollm2-packed --text wikitext2`

    `arbllm eval smollm2-packed --text wiki.test.raw --max-windows 20`

    `arbllm eval model.gguf --text builtin --context 1024 --json`
    """
    with command(debug):
        from arbllm.evaluation.evaluate import evaluate as run
        from arbllm.progress import WindowDisplay

        say("opening", model)
        with WindowDisplay() as display:
            result = run(
                model,
                text,
                context=context,
                max_windows=max_windows,
                skip_windows=skip_windows,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                on_window=display,
            )
        if json:
            print_json(result.to_dict())
            return
        facts = {
            "perplexity": f"{result.perplexity:.3f}",
            "windows": f"{result.windows} of {result.context} tokens",
            "size on disk": format_bytes(result.bytes_on_disk) if result.bytes_on_disk else "unknown",
            "time": f"{result.seconds:.0f} s",
            "peak memory": format_bytes(result.peak_memory_bytes),
        }
        if result.true_bits_per_weight is not None:
            facts["true bits a weight"] = f"{result.true_bits_per_weight:.3f}"
            facts["nominal bits a weight"] = f"{result.nominal_bits_per_weight:.3f}"
        print_facts(facts)
