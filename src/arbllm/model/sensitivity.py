"""How much each linear's bits matter to the model, and how a budget is divided among them by that.

Three figures, from a few windows of text:

- How much the model's loss rises with a linear's relative output error. To second order, with the output's gradient g
  and the error independent of it from token to token, that is half the mean over tokens of sum_i g_i^2 y_i^2.
- How hard a linear is to quantize: sum_j ||w_j||^2 / U_jj^2 over tr(W H W^T), the relative output error per unit of
  relative weight error when later columns make up for earlier ones (U as in `arbllm.factor`).
- How far predictions move when all linears of one kind in one part of the depth are in error (`model.disturbance`).
  Where that is more than the first two foretell, these linears get more bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arbllm.budget import ERROR_PER_BIT, Demand, allocate
from arbllm.config import BinarizationConfig
from arbllm.errors import ModelError
from arbllm.factor import Factor, factorize
from arbllm.model.capture import InputGroup, capture_inputs, gather_hessians, resident
from arbllm.model.disturbance import Group, group_linears, measure_divergences
from arbllm.model.gradients import watch_gradients
from arbllm.model.resume import Progress
from arbllm.model.walk import DecoderBlock, Linear, find_blocks

DAMPING = 0.01
SENSITIVITY_TOKENS, SENSITIVITY_SHARE = 8192, 3  # at most; and of all windows, the third part at most
ERROR_AT_TWO_BITS = 0.05  # relative weight error at which all linears together do to a model what quantization does
MOST_CORRECTION = 8.0
TINY = 1e-30


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
        model: dense; see `measured_shares`.
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
    if shares is None and config.allocation == "measured":
        shares = measured_shares(model, windows, config, device)
        if progress:
            progress.keep_shares(shares)
    elif shares is None:
        shares = uniform_shares(blocks, config)
    return {name: replace(config, bits=share) for name, share in shares.items()}


def uniform_shares(blocks: Sequence[DecoderBlock], config: BinarizationConfig) -> dict[str, float]:
    """As many bits a weight for every linear, as nearly as can be, by module name in the model's order.

    Raises:
        ConfigError: see `arbllm.budget.allocate`.
    """
    assert config.bits is not None, "there is a budget to divide"
    shapes = {linear.name: tuple(linear.weight.shape) for block in blocks for linear in block.linears}
    demands = {name: Demand(rows, columns, rows * columns) for name, (rows, columns) in shapes.items()}
    return allocate(demands, config.bits, config.scale_block, config.trellis)


def measured_shares(
    model: PreTrainedModel, windows: Tensor, config: BinarizationConfig, device: torch.device
) -> dict[str, float]:
    """Bits a weight for every linear, by module name in the model's order.

    Args:
        model: dense, in evaluation mode. It computes on `device` as a whole and is put back as it was.
        windows: text, int64 (N, L).
        config: has the bits for the whole model.
        device: where to compute.
    """
    assert config.bits is not None, "the caller divides a budget"
    few = windows[: max(1, min(-(-SENSITIVITY_TOKENS // windows.shape[1]), len(windows) // SENSITIVITY_SHARE))]
    blocks = find_blocks(model)
    rises, probes = _loss_rises(model, blocks, few, device), _probe(model, blocks, few, device)
    demands = {
        linear.name: Demand(linear.weight.shape[0], linear.weight.shape[1], rises[linear] * probe.effort)
        for linear, probe in probes.items()
    }
    demands |= _alike(demands, blocks)
    shares = allocate(demands, config.bits, config.scale_block, config.trellis)
    groups = group_linears(blocks)
    errors = {linear: probe.error.mul_(_weight_error(shares[linear.name]) ** 0.5) for linear, probe in probes.items()}
    divergences = measure_divergences(model, groups, errors, windows, device)
    return allocate(_corrected(demands, shares, groups, divergences), config.bits, config.scale_block, config.trellis)


def _alike(demands: Mapping[str, Demand], blocks: list[DecoderBlock]) -> dict[str, Demand]:
    """Demands of experts' linears, of which those of one kind in a block are worth the same.

    The few tokens of a measurement do not show which experts other text needs.
    """
    alike: dict[str, Demand] = {}
    for block in blocks:
        for members in group_linears([block]).values():
            routed = [linear.name for linear in members if linear.routed]
            worth = sum(demands[name].worth for name in routed) / max(len(routed), 1)
            alike |= {name: replace(demands[name], worth=worth) for name in routed}
    return alike


def _weight_error(bits: float) -> float:
    """||W - W_hat||^2 / ||W||^2 at so many bits a weight, about."""
    return ERROR_AT_TWO_BITS * ERROR_PER_BIT ** (2 - bits)


def _corrected(
    demands: Mapping[str, Demand],
    shares: Mapping[str, float],
    groups: Mapping[Group, Sequence[Linear]],
    divergences: Mapping[Group, float],
) -> dict[str, Demand]:
    """Demands whose sums over groups are in the proportions of the measured divergences."""
    foretold = {
        group: sum(demands[linear.name].worth * ERROR_PER_BIT ** -shares[linear.name] for linear in linears)
        for group, linears in groups.items()
    }
    unit = sum(divergences.values()) / max(sum(foretold.values()), TINY)
    corrected = dict(demands)
    for group, linears in groups.items():
        factor = divergences[group] / max(unit * foretold[group], TINY)
        factor = min(max(factor, 1 / MOST_CORRECTION), MOST_CORRECTION)
        corrected |= {
            each.name: replace(demands[each.name], worth=factor * demands[each.name].worth) for each in linears
        }
    return corrected


def _loss_rises(
    model: PreTrainedModel, blocks: list[DecoderBlock], windows: Tensor, device: torch.device
) -> dict[Linear, float]:
    """Sum over tokens of sum_i g_i^2 y_i^2 for the outputs y of every linear."""
    totals = {linear: 0.0 for block in blocks for linear in block.linears}

    def add(linear: Linear, value: Tensor, gradient: Tensor) -> None:
        totals[linear] += float((gradient.float() * value.float()).square().sum())

    watch_gradients(model, blocks, windows, device, add)
    return totals


@dataclass(frozen=True)
class _Probe:
    """What there is to know of a linear from its Hessian.

    Attributes:
        effort: relative output error per unit of relative weight error.
        error: an error of its weight, (n, m) in the dtype of the weight, on the CPU: as quantization leaves them,
            spread over columns that make up for each other, with a relative error of 1 before they do.
    """

    effort: float
    error: Tensor


def _probe(
    model: PreTrainedModel, blocks: list[DecoderBlock], windows: Tensor, device: torch.device
) -> dict[Linear, _Probe]:
    """Probe every linear, one block's Hessians in memory at a time."""
    probes = {}
    hidden, calls = capture_inputs(model, blocks, windows, device)
    generator = torch.Generator().manual_seed(0)
    for block, call in zip(blocks, calls, strict=True):
        dtypes = {linear: linear.weight.dtype for linear in block.linears}
        with resident(block.module, device):
            outputs = torch.empty_like(hidden)
            for group in gather_hessians(block, call.to(device), hidden, outputs):
                factor, shrunk = _factorize(group), _factorize(group, group.sampling_error).upper
                for linear in group.linears:
                    weight = linear.weight.float()
                    energy = weight.square().sum(0)
                    floor = energy @ factor.upper.diagonal().square().reciprocal()
                    effort = float(floor / ((weight @ factor.hessian) * weight).sum().clamp(min=TINY))
                    noise = torch.randn(weight.shape, dtype=torch.float32, generator=generator).to(device)
                    error = noise.mul_((energy / len(weight)).sqrt() / shrunk.diagonal()) @ shrunk
                    probes[linear] = _Probe(effort, error.to("cpu", dtypes[linear]))
            hidden = outputs
    return probes


def _factorize(group: InputGroup, shrinkage: float = 0.0) -> Factor:
    """The factor of a group; its warnings are left to the solver, which meets the same Hessian.

    Raises:
        ModelError: the Hessian is not finite; names the layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return factorize(group.trusted(), DAMPING, shrinkage)
        except ModelError as error:
            raise ModelError(f"{group.linears[0].name}: {error}") from error
