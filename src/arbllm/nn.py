"""`BinaryLinear`: a linear layer that holds and computes with a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter, is_
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix, check_order
from arbllm.kernels import cpu, gradient, reference
from arbllm.kernels.dispatch import preparing_kernel

NARROWEST = 8
"""Linears with fewer rows or columns stay dense: scales would take more than their weights."""

_version = attrgetter("_version")


@torch.compiler.assume_constant_result
def _prepare_first(layer: BinaryLinear, kernel: ModuleType, device: torch.device) -> bool:
    """Prepare a weight as soon as a graph is made of its layer: left to the first run, it would end the graph there."""
    return layer._prepare(kernel, device) is not None


class PackedModule(nn.Module):
    """A module whose own buffers keep their dtypes through `.to(dtype)`, `.half()` and the like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but do not cast, the packed tensors: every `nn.Module` conversion comes through here."""
        packed = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in packed.items():
            if self.get_buffer(name).dtype != tensor.dtype:
                self.register_buffer(name, tensor.to(self.get_buffer(name).device))
        return self


class BinaryLinear(PackedModule):
    """y = x W^T + bias with W packed, in place of `nn.Linear` (or GPT-2's `Conv1D`).

    The tensors of `Layout.tensors` are buffers by their own names. They keep their dtypes through `.to(dtype)`,
    `.half()` and the like, which reach the bias alone: scales stay as the checkpoint holds them, whatever the model
    computes in.

    >>> layer = BinaryLinear.from_matrix(arbllm.quantize_matrix(linear.weight, hessian, config), linear.bias)

    Attributes:
        layout: sizes of the packed weight.
        bias: float (n), or None.
        transposed: whether the layer took the place of a `Conv1D`, which stores its weight as (m, n). W is (n, m) here
            all the same; only an export to the dense form needs to know.
        exact: whether a CPU computes in float32 throughout, as PyTorch does. If not, inputs of up to 16 tokens, 64 with
            AVX-512, are rounded to 8 bits or to bfloat16, which is several times faster, and longer ones to bfloat16
            where the processor multiplies that, if they are of it or `torch.set_float32_matmul_precision("medium")`
            allows it. On a GPU, whether levels of a trellis are as they are, which they are not, but in 8 bits, for
            less than some hundreds of tokens. May be set on the class, for all layers.
    """

    bias: nn.Parameter | None
    exact: bool = False

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer, to be filled from a checkpoint.

        Args:
            layout: sizes of the packed weight.
            bias: whether there is a bias.
            transposed: see the class.
            device: where the tensors are made, `meta` for none at all.
            dtype: of the bias.
        """
        super().__init__()
        self.layout = layout
        self.transposed = transposed
        for name, (stored, shape) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        empty = nn.Parameter(torch.empty(layout.rows, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", empty if bias else None)
        # The tensors that were prepared, those of them that are there, how often they were written to, for which
        # device, and what came of it, as `kernels.dispatch.preparing_kernel` makes it.
        self._prepared: tuple[list[Tensor | None], list[Tensor], list[int], torch.device, Any] | None = None

    @classmethod
    def from_matrix(cls, matrix: BinaryMatrix, bias: Tensor | None = None, transposed: bool = False) -> BinaryLinear:
        """A layer around a packed weight; it shares the tensors of `matrix` and `bias`."""
        layer = cls(matrix.layout, transposed=transposed, device="meta")
        for name, tensor in matrix.tensors().items():
            layer.register_buffer(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def in_features(self) -> int:
        """The input width m."""
        return self.layout.columns

    @property
    def out_features(self) -> int:
        """The output width n."""
        return self.layout.rows

    @property
    def qweight(self) -> Tensor:
        """An empty tensor where the layer computes; what puts adapters beside quantized layers looks for this name."""
        place = self._prepared[3] if self._prepared else self.get_buffer("signs").device
        return torch.empty(0, dtype=torch.uint8, device=place)

    @property
    def matrix(self) -> BinaryMatrix:
        """The packed weight; shares the buffers.

        Raises:
            CheckpointError: a buffer was replaced by one of another dtype or shape.
        """
        return BinaryMatrix.from_tensors(self.layout, {name: self.get_buffer(name) for name in self.layout.tensors()})

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., m) to y (..., n), in the dtype of x.

        The first call prepares the weight for the device of x, as does the first call after a packed tensor was
        replaced or written to (unless through its `.data`). The stored form then leaves the memory that the kernel
        computes from: on a CPU with Linux, tensors that come from a checkpoint are left to the file; on a GPU they go
        to the host's memory, where `state_dict` finds them. In a compiled model the weight stays as it was when it was
        compiled.

        Raises:
            ValueError: x has another number of columns than the weight or is not of floating point, or they are on
                devices that do not go together.
            CheckpointError: a packed tensor was replaced by one that cannot be right.
            ConfigError: `torch.jit.trace` follows; `torch.compile` and `torch.export` may.
        """
        kernel = preparing_kernel(x)
        if kernel is None:
            y = self._multiply_followed(x)
        else:
            y = kernel.multiply(x, self._weight(kernel, x.device), self.layout.rows, exact=self.exact)
        bias = self._parameters["bias"]  # a microsecond faster than `self.bias`
        return y if bias is None else y + bias.to(y.dtype)

    def _multiply_followed(self, x: Tensor) -> Tensor:
        """x W^T where PyTorch follows it, or gradients go back."""
        if not gradient.is_wanted(x):
            return reference.matmul(x, self._matrix_for(x.device))
        reference.check_width(x, self.in_features)
        with torch.no_grad():
            kernel = preparing_kernel(x)
        matrix = self._matrix_for(x.device)
        transposed = partial(reference.multiply_transposed, matrix=matrix)
        if kernel is not cpu:
            return gradient.differentiable(x, partial(reference.matmul, matrix=matrix), transposed, transposed)
        weight, (rows, columns) = self._weight(cpu, x.device), (self.out_features, self.in_features)
        return gradient.differentiable(
            x,
            partial(cpu.multiply, prepared=weight, rows=rows, exact=True),
            partial(cpu.multiply_transposed, prepared=weight, columns=columns),
            transposed,
        )

    def _weight(self, kernel: ModuleType, device: torch.device) -> Any:
        """The weight as the kernel reads it."""
        if not torch.compiler.is_compiling():
            return self._prepare(kernel, device)
        _prepare_first(self, kernel, device)
        assert self._prepared is not None
        return self._prepared[-1]

    def _prepare(self, kernel: ModuleType, device: torch.device) -> Any:
        """Prepare the weight, if that has not been done for the tensors as they are."""
        if self._prepared:
            known, watched, versions, place, prepared = self._prepared
            same = place == device and all(map(is_, self._buffers.values(), known))
            if same and list(map(_version, watched)) == versions:
                return prepared
        self._count_writes()
        matrix = self._matrix_for(device)
        if matrix.explicit_order is not None:
            check_order(self.layout, matrix.explicit_order, "column_order")  # kernels would read elsewhere
        prepared = kernel.prepare(matrix)
        self._leave_stored(kernel)
        known = list(self._buffers.values())
        watched = [tensor for tensor in known if tensor is not None]
        self._prepared = known, watched, list(map(_version, watched)), device, prepared
        return prepared

    def _count_writes(self) -> None:
        """Put copies in the place of tensors that were made in inference mode: those do not count writes."""
        for name, tensor in list(self.named_buffers(recurse=False)):
            if tensor.is_inference():
                with torch.inference_mode(False):
                    self.register_buffer(name, tensor.clone())

    def _matrix_for(self, device: torch.device) -> BinaryMatrix:
        """The packed weight where it is to be read; what a GPU's layer left to the host is copied.

        Raises:
            ValueError: it is on another GPU.
        """
        matrix = self.matrix
        if device.type != "cuda" or matrix.signs.device == device:
            return matrix
        if not matrix.signs.is_cpu:
            raise ValueError(
                f"the packed weight is on {matrix.signs.device}, its input on {device}; move one to the other"
            )
        return matrix.map(lambda tensor: tensor.to(device))

    def _leave_stored(self, kernel: ModuleType) -> None:
        """Keep the stored form, which was prepared, out of the memory that the kernel computes from."""
        matrix = self.matrix
        if kernel is cpu:
            cpu.give_back(matrix)
        elif not matrix.signs.is_cpu:
            with torch.inference_mode(False):  # else they could never be written to again
                for name, tensor in matrix.tensors().items():
                    self.register_buffer(name, tensor.cpu())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._prepared:
            known, *_, place, _ = self._prepared
            if place.type != "cpu" or not all(map(is_, self._buffers.values(), known)):
                self._prepared = None  # which would keep memory that the layer leaves
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared": None}

    def extra_repr(self) -> str:
        """Sizes, and bits per weight, in the printed model."""
        matrix = self.matrix
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nominal_bits={matrix.nominal_bits:.2f}, true_bits={matrix.true_bits:.2f}"
        )
