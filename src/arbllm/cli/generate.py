"""`arbllm generate MODEL PROMPT`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from arbllm.cli.options import Debug, Device, Dtype, Json, Model, TrustRemoteCode
from arbllm.cli.output import command, print_json


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that are there already become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw, with a temperature above 0.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue PROMPT with MODEL, dense or packed; the text appears as it is written.

    **Examples**

    `arbllm generate smollm2-packed "Once upon a time"`

    `arbllm generate smollm2-packed "The moon is" --temperature 0.8 --seed 3 --repetition-penalty 1.1`
    """
    with command(debug):
        from arbllm.device import choose_device, evaluation_dtype, float32_precision
        from arbllm.evaluation.generate import generate as run
        from arbllm.measure import measure
        from arbllm.model.source import open_model

        chosen = choose_device(device)
        opened, tokenizer = open_model(
            model, dtype=evaluation_dtype(dtype, chosen), device=chosen, trust_remote_code=trust_remote_code
        )
        unwritten = [prompt]  # until there is something to write behind it

        def write(text: str) -> None:
            _write("".join(unwritten) + text)
            unwritten.clear()

        # So that packed models read long prompts several times as fast; their weights have fewer digits anyway.
        medium = dtype == "auto" and chosen.type == "cpu"
        with measure() as measured, float32_precision("medium") if medium else nullcontext():
            text = run(
                opened,
                tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                repetition_penalty=repetition_penalty,
                seed=seed,
                on_text=None if json else write,
            )
        if json:
            print_json({"prompt": prompt, "text": text, **measured.to_dict()})
        else:
            write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
