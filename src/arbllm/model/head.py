"""The output head of a model apart from its decoder, for logits of a few tokens at a time.

The logits of a whole window are large: 2048 x 128k of them in float32 take a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LOGIT_BYTES = 64 * 2**20
PROBE_TOKENS = 8

Head = Callable[[Tensor], Tensor]


@torch.no_grad()
def split_head(model: PreTrainedModel) -> Head | None:
    """The model's output head, if its logits are just head(decoder's last hidden state).

    Whether they are is tried out on a few tokens: some architectures scale or cap their logits afterwards.

    Returns:
        The head, or None where the whole model must run to get logits.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or model.base_model is model:
        return None
    probe = torch.arange(PROBE_TOKENS, device=model.device)[None] % vocabulary_size(model)
    hidden = getattr(model.base_model(input_ids=probe, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return None
    expected = model(input_ids=probe, use_cache=False).logits
    return head if torch.equal(head(hidden), expected) else None


def tokens_at_a_time(model: PreTrainedModel) -> int:
    """How many tokens' logits fit in LOGIT_BYTES as float32, at least one."""
    return max(1, LOGIT_BYTES // (4 * vocabulary_size(model)))


def vocabulary_size(model: PreTrainedModel) -> int:
    """Entries of the model's vocabulary, which is how many logits a token has."""
    return model.config.get_text_config().vocab_size
