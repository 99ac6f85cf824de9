"""How much each linear's bits matter to the model, and how a budget is divided among them by that.

Two figures a linear, from a few windows of text:

- How much the model's loss rises with the linear's relative output error. To second order, with the output's gradient g
  and the error independent of it from token to token, that is half the mean over tokens of sum_i g_i^2 y_i^2.
- How hard the linear is to quantize: sum_j ||w_j||^2 / U_jj^2 over tr(W H W^T), the relative output error per unit of
  relative weight error when later columns make up for earlier ones (U as in `arbllm.factor`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arbllm.budget import Demand, allocate
from arbllm.config import BinarizationConfig
from arbllm.errors import ModelError
from arbllm.factor import Factor, factorize
from arbllm.model.capture import InputGroup, capture_inputs, gather_hessians, resident
from arbllm.model.gradients import watch_gradients
from arbllm.model.resume import Progress
from arbllm.model.walk import DecoderBlock, Linear, find_blocks

DAMPING = 0.01
SENSITIVITY_TOKENS, SENSITIVITY_SHARE = 8192, 3  # at most; and of all windows, the third part at most


def linear_configs(
    model: PreTrainedModel,
    blocks: list[DecoderBlock],
    windows: Tensor,
    config: BinarizationConfig,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, BinarizationConfig]:
    """What each linear is quantized with: the budget, where there is one, is divided among them.

    Args:
        model: dense; see `measure_demands`.
        blocks: its decoder blocks.
        windows: calibration tokens, int64 (N, L); a few of them are used.
        config: method and options for the model.
        device: where to compute.
        progress: has the shares if they were measured before, and keeps them.
    """
    linears = [linear for block in blocks for linear in block.linears]
    if config.bits is None:
        return {linear.name: config for linear in linears}
    shares = progress.shares() if progress else None
    if shares is not None:
        return {name: replace(config, bits=share) for name, share in shares.items()}
    if config.allocation == "measured":
        few = windows[: max(1, min(-(-SENSITIVITY_TOKENS // windows.shape[1]), len(windows) // SENSITIVITY_SHARE))]
        demands = measure_demands(model, few, device)
    else:
        shapes = {linear.name: tuple(linear.weight.shape) for linear in linears}
        demands = {name: Demand(rows, columns, rows * columns) for name, (rows, columns) in shapes.items()}
    shares = allocate(demands, config.bits, config.scale_block)
    if progress and config.allocation == "measured":
        progress.keep_shares(shares)
    return {name: replace(config, bits=share) for name, share in shares.items()}


def measure_demands(model: PreTrainedModel, windows: Tensor, device: torch.device) -> dict[str, Demand]:
    """What `budget.allocate` needs to know of every linear.

    Args:
        model: dense, in evaluation mode. It computes on `device` as a whole and is put back afterwards.
        windows: a few windows of text, int64 (N, L).
        device: where to compute.

    Returns:
        Module name -> demand, in the model's order.
    """
    blocks = find_blocks(model)
    rises = _loss_rises(model, blocks, windows, device)
    efforts = _efforts(model, blocks, windows, device)
    linears = [linear for block in blocks for linear in block.linears]
    return {
        linear.name: Demand(linear.weight.shape[0], linear.weight.shape[1], rises[linear] * efforts[linear])
        for linear in linears
    }


def _loss_rises(
    model: PreTrainedModel, blocks: list[DecoderBlock], windows: Tensor, device: torch.device
) -> dict[Linear, float]:
    """Sum over tokens of sum_i g_i^2 y_i^2 for the outputs y of every linear."""
    totals = {linear: 0.0 for block in blocks for linear in block.linears}

    def add(linear: Linear, value: Tensor, gradient: Tensor) -> None:
        totals[linear] += float((gradient.float() * value.float()).square().sum())

    watch_gradients(model, blocks, windows, device, add)
    return totals


def _efforts(
    model: PreTrainedModel, blocks: list[DecoderBlock], windows: Tensor, device: torch.device
) -> dict[Linear, float]:
    """Relative output error per unit of relative weight error, one block's Hessians in memory at a time."""
    efforts = {}
    hidden, calls = capture_inputs(model, blocks, windows, device)
    for block, call in zip(blocks, calls, strict=True):
        with resident(block.module, device):
            outputs = torch.empty_like(hidden)
            for group in gather_hessians(block, call.to(device), hidden, outputs):
                factor = _factorize(group)
                for linear in group.linears:
                    weight = linear.weight.float()
                    floor = weight.square().sum(0) @ factor.upper.diagonal().square().reciprocal()
                    efforts[linear] = float(floor / ((weight @ factor.hessian) * weight).sum().clamp(min=1e-30))
            hidden = outputs
    return efforts


def _factorize(group: InputGroup) -> Factor:
    """The factor of a group; its warnings are left to the solver, which meets the same Hessian.

    Raises:
        ModelError: the Hessian is not finite; names the layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return factorize(group.hessian, DAMPING)
        except ModelError as error:
            raise ModelError(f"{group.linears[0].name}: {error}") from error
