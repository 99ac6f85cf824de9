"""How much each calibration token counts in a linear's Hessian: as much as the model's loss heeds the output there.

Weighted by ||g||, the norm of the loss's gradient at the linear's output for this token. To second order the loss would
call for ||g||^2 (as GuidedQuant has it, arXiv 2505.07004), but then a handful of tokens has most of the weight, and all
others are hardly seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arbllm.errors import ModelError
from arbllm.model.gradients import watch_gradients
from arbllm.model.ranks import Ranks
from arbllm.model.walk import DecoderBlock, Linear

TokenWeights = Mapping[Linear, Tensor]


def weigh_tokens(
    model: PreTrainedModel,
    blocks: Sequence[DecoderBlock],
    windows: Tensor,
    device: torch.device,
    ranks: Ranks,
    on_window: Callable[[int], None] | None = None,
) -> TokenWeights:
    """The weight of each token for each linear, float32 (N, L), their mean over all ranks 1.

    The last token of a window has none, since nothing is predicted from it.

    Args:
        model: dense; it computes on `device` as a whole and is put back afterwards.
        blocks: its decoder blocks.
        windows: calibration tokens of this rank, int64 (N, L).
        device: where to compute.
        ranks: the processes that have other windows.
        on_window: told of each window that is done, how many are.

    Raises:
        ModelError: a gradient is not finite; names the layer.
    """
    linears = [linear for block in blocks for linear in block.linears]
    places = {linear: place for place, linear in enumerate(linears)}
    # One tensor for all: small ones, made while large ones come and go, would break the memory between them to pieces.
    norms = torch.zeros(len(linears), *windows.shape)
    window = 0

    def add(linear: Linear, _: Tensor, gradient: Tensor) -> None:
        norms[places[linear], window, :-1] = gradient[0].float().norm(dim=-1)

    def advance(done: int) -> None:
        nonlocal window
        window = done
        if on_window:
            on_window(done)

    watch_gradients(model, blocks, windows, device, add, advance)
    means = norms.mean((1, 2))
    ranks.average([means])
    if not torch.isfinite(means).all():
        name = linears[int(torch.isfinite(means).logical_not().nonzero()[0])].name
        raise ModelError(f"{name}: the gradient of the model's loss is not finite there; choose token weights 'equal'")
    norms[means == 0] = 1.0  # what the loss does not heed at all
    norms /= torch.where(means == 0, 1.0, means)[:, None, None]
    return dict(zip(linears, norms, strict=True))
