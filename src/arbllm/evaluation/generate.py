"""Text from a model, as it is being written."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from arbllm.errors import ConfigError
from arbllm.model.perplexity import longest_context


class _Callback(TextStreamer):
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each stretch of text that later tokens cannot change any more."""
        if text:
            self.on_text(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt.

    Args:
        model: a causal LM, dense or packed.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        max_new_tokens: tokens to write at most; the model may end sooner.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn from as many as the model's own
            settings tell, by transformers' default from the 50 likeliest.
        repetition_penalty: above 1, makes tokens that are there already less likely: logits are divided by it, or
            multiplied where they are negative. Small models run in circles less.
        seed: of the draw.
        on_text: called with each piece of text as soon as it is final.

    Returns:
        The continuation, without the prompt.

    Raises:
        ConfigError: the prompt holds no token or no text, or a number is out of range.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be 0 or more, not {temperature}")
    if not repetition_penalty > 0:
        raise ConfigError(f"repetition_penalty must be above 0 (1 for none), not {repetition_penalty}")
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed must be a number of 64 bits, not {seed}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is no valid text; give it in UTF-8") from error
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty; give the model some text to continue")
    _check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pieces: list[str] = []

    def receive(text: str) -> None:
        pieces.append(text)
        if on_text:
            on_text(text)

    with torch.inference_mode():
        model.eval().generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=_Callback(tokenizer, receive),
            **sampling,
        )
    return "".join(pieces)


def _check_length(model: PreTrainedModel, given: int, wanted: int) -> None:
    longest = longest_context(model.config, given + wanted)
    if given + wanted > longest:
        rest = f"ask for {longest - given} or fewer" if given < longest else "shorten the prompt"
        raise ConfigError(f"{given} tokens of the prompt and {wanted} new ones; the model takes {longest}: {rest}")
