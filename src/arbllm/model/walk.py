"""Find the decoder blocks of a causal language model, and their linears, by structure rather than by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arbllm.errors import ModelError
from arbllm.experts import SplitExperts, split_experts
from arbllm.nn import NARROWEST, BinaryLinear

ROUTERS = frozenset(("router", "gate"))
"""What models call what chooses among experts."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder block.

    Attributes:
        name: full name in the model, as `named_modules` gives it.
        module: an `nn.Linear`, or a `Conv1D` of transformers.
        transposed: whether the module stores its weight as inputs by outputs (`Conv1D`).
        routed: whether it is an expert's, which is given some of the tokens, or none.
    """

    name: str
    module: nn.Linear | Conv1D
    transposed: bool
    routed: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight as outputs by inputs, (n, m): a view."""
        stored = self.module.weight.detach()
        return stored.T if self.transposed else stored

    def set_weight(self, weight: Tensor) -> None:
        """Replace the weight's values by `weight`, (n, m)."""
        self.module.weight.data = weight.T.contiguous() if self.transposed else weight


@dataclass(frozen=True)
class DecoderBlock:
    """A decoder block and its linears in order of appearance.

    Attributes:
        index: its place in the model, from 0.
        name: full name in the model.
        module: the block.
        linears: what there is to binarize.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]


def find_blocks(model: PreTrainedModel) -> list[DecoderBlock]:
    """The decoder blocks: the list of modules that holds more linear weights than any other, nested ones aside.

    Looked for in what transformers calls the model's decoder: what reads images or sounds has such lists, too. All that
    lies outside the list is not touched, as embeddings, norms and head, nor are linears of fewer rows or columns than
    NARROWEST, nor those of a mixture's routers, which are small and on which all else depends.

    Experts in one tensor have no linears: they are split, which changes the model's modules, but nothing that it
    computes (see `arbllm.experts`).

    Raises:
        ModelError: the model is an encoder-decoder, does not read text alone, is quantized already, has no such list,
            or a block without linears in it; the message names what was found.
    """
    _refuse_other_kinds(model)
    split_experts(model)
    inside = set(model.get_decoder().modules())
    lists = [(name, found) for name, found in model.named_modules() if isinstance(found, nn.ModuleList)]
    lists = [(name, found) for name, found in lists if found in inside] or lists
    # A list comes before the lists inside its modules and holds at least as many weights, so the outermost one wins.
    name, blocks = max(lists, key=lambda found: _linear_weights(found[1]), default=("", nn.ModuleList()))
    if not _linear_weights(blocks):
        found = ", ".join(
            f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in lists if len(module)
        )
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers (lists of modules in it: "
            f"{found or 'none'}); only causal language models made of such blocks can be binarized"
        )
    found_blocks = [
        DecoderBlock(index, f"{name}.{index}", block, tuple(_linears(f"{name}.{index}", block)))
        for index, block in enumerate(blocks)
    ]
    for block in found_blocks:
        if not block.linears:
            raise ModelError(f"{block.name} has no linear layers; such an architecture is not supported")
    return found_blocks


def check_weights(blocks: list[DecoderBlock]) -> None:
    """Look at every block and linear before any work is done.

    Raises:
        ModelError: most weights of a block are not in linears; names the largest of them.
        ModelError: two linears have one weight; names them.
        ModelError: a weight is not in memory, not a matrix of floats, or has NaN or infinite entries; names the layer.
    """
    owners: dict[Tensor, str] = {}
    check_shares(blocks)
    for block in blocks:
        for linear in block.linears:
            if (owner := owners.setdefault(linear.module.weight, linear.name)) != linear.name:
                raise ModelError(f"{linear.name} shares its weight with {owner}; such an architecture is not supported")
    for linear in (linear for block in blocks for linear in block.linears):
        weight = linear.weight
        if weight.is_meta:
            raise ModelError(f"{linear.name}: its weight is not in memory; load the model without offloading")
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ModelError(
                f"{linear.name}: its weight is {weight.dtype} of shape {list(weight.shape)}, not a matrix of floats; "
                "start from the unquantized model"
            )
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{linear.name}: its weight has NaN or infinite entries; the model file is damaged, or its dtype is "
                "too narrow (try --dtype float32)"
            )


def check_shares(blocks: list[DecoderBlock]) -> None:
    """Refuse blocks that would stay mostly dense, such as those whose experts are in one tensor and cannot be split.

    Raises:
        ModelError: most weights of a block are not in linears; names the largest of them.
    """
    for block in blocks:
        linears = {linear.module.weight for linear in block.linears}
        others = {name: parameter for name, parameter in block.module.named_parameters() if parameter not in linears}
        if sum(other.numel() for other in others.values()) > sum(weight.numel() for weight in linears):
            largest = max(others, key=lambda name: others[name].numel())
            raise ModelError(
                f"{block.name}: most of its weights are not in linear layers, the largest being {largest} "
                f"{list(others[largest].shape)}; such an architecture is not supported"
            )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _refuse_other_kinds(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    configs = model.config, model.config.get_text_config(decoder=True)
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise ModelError(f"{kind} is an encoder-decoder; only causal language models can be binarized")
    wanted = _demanded(model.forward) - {"input_ids"}
    if wanted:
        raise ModelError(
            f"{kind} does not read text alone: it demands {', '.join(sorted(wanted))}; such an architecture is not "
            "supported"
        )
    if any(isinstance(module, BinaryLinear) for module in model.modules()):
        raise ModelError(f"{kind} is binarized already; start from the original model")
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model.config.quantization_config, "quant_method", "another method")
        raise ModelError(
            f"{kind} is quantized already ({getattr(method, 'value', method)}); start from the original model"
        )


def _demanded(function: Callable[..., Any]) -> set[str]:
    """Names of the parameters that a function cannot do without."""
    return {
        name
        for name, parameter in signature(function).parameters.items()
        if parameter.default is Parameter.empty
        and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    }


def _linears(prefix: str, block: nn.Module) -> Iterator[Linear]:
    mixtures = [module for module in block.modules() if isinstance(module, SplitExperts)]
    experts = {module for mixture in mixtures for module in mixture.modules()}
    for name, module in block.named_modules(prefix=prefix):
        if mixtures and module not in experts and not ROUTERS.isdisjoint(name.split(".")):
            continue
        if isinstance(module, Conv1D):
            widths = module.weight.shape
        elif isinstance(module, nn.Linear):
            widths = module.out_features, module.in_features
        else:
            continue
        if min(widths) >= NARROWEST:
            yield Linear(name, module, isinstance(module, Conv1D), routed=module in experts)


def _linear_weights(module: nn.Module) -> int:
    return sum(linear.module.weight.numel() for linear in _linears("", module))
