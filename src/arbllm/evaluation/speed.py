"""Samples of text, and how fast they were written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The history of the city begins",
    "To bake good bread, you need",
    "Question: Why is the sky blue?\nAnswer:",
)
TIMED_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """A continuation, greedily chosen."""

    prompt: str
    text: str


@torch.inference_mode()
def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 48,
) -> list[Sample]:
    """Continue every prompt by the likeliest tokens, `new_tokens` at most."""
    return [Sample(prompt, _continue(model, tokenizer, prompt, new_tokens)[0]) for prompt in prompts]


@torch.inference_mode()
def tokens_per_second(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int = TIMED_TOKENS, repeats: int = 3
) -> float:
    """Tokens written a second, one text at a time: the best of a few runs, after one that warms up."""
    _continue(model, tokenizer, PROMPTS[0], 4)
    return max(tokens / _continue(model, tokenizer, PROMPTS[0], tokens, exactly=True)[1] for _ in range(repeats))


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, exactly: bool = False
) -> tuple[str, float]:
    """A continuation and its seconds."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    start = time.perf_counter()
    output = model.eval().generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        min_new_tokens=tokens if exactly else None,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # whatever the model's own settings are
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    seconds = time.perf_counter() - start  # reading the tokens below would wait for a GPU, as generate itself does
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), seconds
