"""Mixtures of experts, each expert with linears of its own.

transformers holds a layer's experts in one tensor for each of their projections, where nothing is a linear layer that
could be calibrated, packed or multiplied by a kernel. `SplitExperts` takes the place of such a module, and computes the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from arbllm.errors import ModelError
from arbllm.nn import NARROWEST

INNER, OUTER = ("gate_up_proj", "up_proj"), "down_proj"
BIAS = "_bias"
LLAMA4 = "Llama4TextExperts"
"""The class of Llama 4's experts, which follow an interface of their own."""


@dataclass(frozen=True)
class Form:
    """What `transformers.integrations.moe.use_experts_implementation` tells of a module of experts.

    Attributes:
        has_gate: whether the first projection gives a gate as well.
        has_bias: whether projections have biases.
        is_transposed: whether weights are stored as inputs by outputs.
        has_post_expert_norm: whether an expert ends with a norm.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool

    @classmethod
    def of(cls, module: nn.Module) -> Form | None:
        """The form of a module of experts; None of other modules."""
        if type(module).__name__ == LLAMA4:
            return cls(has_gate=True, has_bias=False, is_transposed=True, has_post_expert_norm=False)
        told = vars(module)
        names = cls.__annotations__
        return cls(**{name: told[name] for name in names}) if told.keys() >= names.keys() else None

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two projections."""
        return INNER[0 if self.has_gate else 1], OUTER

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that the fused module has."""
        return [*self.projections, *(f"{name}{BIAS}" for name in self.projections if self.has_bias)]


class SplitExperts(nn.Module):
    """The experts of a layer, as children "0", "1" and so on, each with the projections of the fused module.

    A projection is a linear layer: `gate_up_proj` (or `up_proj`, where there is no gate) and `down_proj`. Other
    children, such as an activation or a norm, are those of the fused module under their names.

    Attributes:
        num_experts: how many there are.
        form: of the fused module.
        fused: the module whose place this is, without its tensors; it knows what is between the projections.
    """

    num_experts: int
    form: Form
    fused: nn.Module

    def __init__(self, fused: nn.Module, form: Form) -> None:
        """Take the weights out of `fused`, without copying them unless they are stored as inputs by outputs."""
        super().__init__()
        self.num_experts = cast(int, fused.num_experts)
        self.form = form
        object.__setattr__(self, "fused", fused)  # no submodule: its children are this one's
        for name, child in fused.named_children():
            self.add_module(name, child)
        projections = {name: _take_linears(fused, form, name) for name in form.projections}
        for number in range(self.num_experts):
            expert = nn.ModuleDict({name: linears[number] for name, linears in projections.items()})
            self.add_module(str(number), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what a token's experts make of it.

        Args:
            hidden_states: float (tokens, d).
            top_k_index: each token's experts, int64 (tokens, k); numbers from `num_experts` on stand for none.
            top_k_weights: their weights, float (tokens, k).

        Returns:
            As `hidden_states`; sums over experts in the order of their numbers.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # sums of half precision would be coarse
        result = torch.zeros_like(hidden_states, dtype=dtype)
        for number, chosen in self._routed(top_k_index):
            tokens, weights = chosen // top_k_index.shape[1], top_k_weights.flatten()[chosen].to(dtype)
            result.index_add_(0, tokens, self.expert(number, hidden_states[tokens]) * weights[:, None])
        return result.to(hidden_states.dtype)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """What one expert makes of x, (tokens, d) to (tokens, d)."""
        linears = cast(nn.ModuleDict, self.get_submodule(str(number)))
        inner, outer = linears.values()
        x = outer(self._between(inner(x)))
        return self.fused.post_expert_norm(x) if self.form.has_post_expert_norm else x  # type: ignore[operator]

    def _between(self, x: Tensor) -> Tensor:
        """From what the first projection gives to what the second takes."""
        return self.fused._apply_gate(x) if self.form.has_gate else self.fused.act_fn(x)  # type: ignore[operator]

    @torch.compiler.disable
    def _routed(self, top_k_index: Tensor) -> list[tuple[int, Tensor]]:
        """Experts that any token goes to, and the places of the flattened `top_k_index` that say so, int64."""
        flat = top_k_index.flatten()
        counts = flat.bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        places = flat.argsort(stable=True)[: sum(counts)].split(counts)
        return [(number, chosen) for number, chosen in enumerate(places) if len(chosen)]


class SplitLlama4Experts(SplitExperts):
    """The experts of a layer of Llama 4, each of which is given all tokens, times the router's scores.

    Those of zero score, whose output is zero, are left out.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """What each expert makes of its own copy of all tokens.

        Args:
            hidden_states: float (experts * tokens, d), those of one expert after those of another.

        Returns:
            As `hidden_states`.
        """
        result = torch.zeros_like(hidden_states)
        for number, places in self._scored(hidden_states):
            result[places] = self.expert(number, hidden_states[places])
        return result

    def _between(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return up * self.fused.act_fn(gate)  # type: ignore[operator]

    @torch.compiler.disable
    def _scored(self, hidden_states: Tensor) -> list[tuple[int, Tensor]]:
        """Experts that any token goes to, and the rows that are theirs, int64."""
        rows = hidden_states.any(1).nonzero()[:, 0]
        tokens = max(len(hidden_states) // self.num_experts, 1)
        counts = (rows // tokens).bincount(minlength=self.num_experts).tolist()
        return [(number, places) for number, places in enumerate(rows.split(counts)) if len(places)]


def split_experts(model: nn.Module) -> None:
    """Put `SplitExperts` in the place of every module that has its experts in one tensor, in place.

    Known are those of transformers' common interface of experts and Llama 4's; others stay as they are, as do those
    whose linears would be too narrow to be packed.
    """
    for name, module in list(model.named_modules()):
        form = Form.of(module)
        if form and _has_tensors_of(module, form):
            kind = SplitLlama4Experts if type(module).__name__ == LLAMA4 else SplitExperts
            model.set_submodule(name, kind(module, form))


def fuse_experts(model: nn.Module) -> None:
    """The reverse of `split_experts`, in place; weights are copied, one layer's at a time.

    Raises:
        ModelError: an expert is packed; names it.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, SplitExperts)]:
        split = cast(SplitExperts, model.get_submodule(name))
        for projection in split.form.projections:
            _give_linears(split, f"{name}.", projection)
        model.set_submodule(name, split.fused)


def fused_name(name: str) -> str:
    """What the fused module calls an expert's `gate_up_proj.weight`, `gate_up_proj.bias` and so on."""
    projection, _, kind = name.partition(".")
    return projection if kind == "weight" else projection + BIAS


def _has_tensors_of(module: nn.Module, form: Form) -> bool:
    """Whether a module has the tensors of a form and no others, none too narrow to be packed."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if own.keys() != set(form.tensors) or module._buffers:
        return False
    return all(own[name].ndim == 3 and min(own[name].shape[1:]) >= NARROWEST for name in form.projections)


def _take_linears(fused: nn.Module, form: Form, name: str) -> list[nn.Linear]:
    """Linears of a projection, one an expert, out of the fused module's tensors."""
    weights = fused._parameters.pop(name)
    biases = fused._parameters.pop(f"{name}{BIAS}", None)
    assert weights is not None, "the caller has seen to it"
    trainable = weights.requires_grad
    linears = []
    for number, stored in enumerate(weights.detach()):
        weight = stored.mT.contiguous() if form.is_transposed else stored
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None)
        linear.weight = nn.Parameter(weight, requires_grad=trainable)
        if biases is not None:
            linear.bias = nn.Parameter(biases.detach()[number], requires_grad=trainable)
        linears.append(linear)
    return linears


def _give_linears(split: SplitExperts, prefix: str, name: str) -> None:
    """Stack the linears of a projection to the fused module's tensors.

    Raises:
        ModelError: one is packed.
    """
    linears = []
    for number in range(split.num_experts):
        linear = split.get_submodule(f"{number}.{name}")
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"{prefix}{number}.{name}: is packed; a mixture is fused when all its experts are dense")
        linears.append(linear)
    fused, trainable = split.fused, linears[0].weight.requires_grad
    weights = [linear.weight.detach() for linear in linears]
    stacked = torch.stack([weight.mT for weight in weights] if split.form.is_transposed else weights)
    fused.register_parameter(name, nn.Parameter(stacked, requires_grad=trainable))
    if split.form.has_bias:
        biases = torch.stack([linear.bias.detach() for linear in linears])
        fused.register_parameter(f"{name}{BIAS}", nn.Parameter(biases, requires_grad=trainable))
