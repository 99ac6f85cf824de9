"""Embeddings and output heads that hold and compute with 8-bit rows (see `arbllm.format.rows`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from arbllm.format.rows import RowLayout, dequantize_rows, quantize_rows
from arbllm.kernels import row_tiles, rows
from arbllm.nn import PackedModule


class Int8Embedding(PackedModule):
    """An embedding in 8-bit rows, in place of an `nn.Embedding`.

    The dense module stays inside without its weight and is called with the rows that a text needs, so that what its
    class does beyond a look-up (Gemma multiplies by a scale) stays as it was.

    Attributes:
        layout: its size.
        inner: the dense module; its weight (0, d) tells the dtype that the model computes in.
        padding_idx: of the dense module.
        codes: int8 (V, d).
        scales: float16 (V).
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layout: RowLayout, dense: nn.Embedding) -> None:
        """An empty embedding, to be filled from a checkpoint, on the device of `dense`, which it takes over."""
        super().__init__()
        self.layout = layout
        _register_rows(self, dense.weight.device)
        stand_in = dense.weight.detach().new_empty(0, layout.columns)
        del dense.weight
        dense.register_buffer("weight", stand_in, persistent=False)
        self.padding_idx, dense.padding_idx = dense.padding_idx, None  # which has to do with gradients alone
        self.inner = dense

    @classmethod
    def from_dense(cls, dense: nn.Embedding) -> Int8Embedding:
        """The rounded embedding; takes `dense` over, and drops its weight.

        Raises:
            ModelError: see `quantize_rows`.
        """
        codes, scales = quantize_rows(dense.weight.detach())
        module = cls(RowLayout(*codes.shape), dense)
        module.codes, module.scales = codes, scales
        return module

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The dense module with the rounded weight; takes it out, so that this object is of no use any more."""
        dense: nn.Embedding = self.inner
        del dense.weight
        dense.weight = nn.Parameter(dequantize_rows(self.codes, self.scales, dtype), requires_grad=False)
        dense.padding_idx = self.padding_idx
        return dense

    @property
    def num_embeddings(self) -> int:
        """The vocabulary V."""
        return self.layout.rows

    @property
    def embedding_dim(self) -> int:
        """The width d."""
        return self.layout.columns

    def forward(self, ids: Tensor) -> Tensor:
        """Map token numbers (...) to vectors (..., d), in the dtype that the model computes in."""
        flat = ids.reshape(-1)
        codes, scales = self.codes.index_select(0, flat), self.scales.index_select(0, flat)
        vectors = dequantize_rows(codes, scales, self.inner.weight.dtype)
        places = torch.arange(len(flat), device=ids.device).view(ids.shape)
        found: Tensor = functional_call(self.inner, {"weight": vectors}, (places,))
        return found

    def extra_repr(self) -> str:
        """Sizes, in the printed model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"


class Int8Linear(PackedModule):
    """y = x W^T + bias with W in 8-bit rows, in place of an `nn.Linear`: an output head.

    A tied head has no tensors of its own. It reads those of the embedding, which it knows, but does not hold as a part
    of itself: they are in memory, in the state dict and in files once.

    Attributes:
        layout: its size.
        bias: float (V), or None.
    """

    bias: nn.Parameter | None

    def __init__(self, layout: RowLayout, dense: nn.Linear, tied: Int8Embedding | None = None) -> None:
        """A head that is tied, or else empty, to be filled from a checkpoint; it has the device and bias of `dense`."""
        super().__init__()
        self.layout = layout
        self._tied = (tied,)  # in a tuple, where PyTorch does not find it
        if tied is None:
            _register_rows(self, dense.weight.device)
        self.register_parameter("bias", dense.bias)

    @classmethod
    def from_dense(cls, dense: nn.Linear) -> Int8Linear:
        """The rounded head, not tied; shares the bias of `dense`.

        Raises:
            ModelError: see `quantize_rows`.
        """
        codes, scales = quantize_rows(dense.weight.detach())
        module = cls(RowLayout(*codes.shape), dense)
        module.codes, module.scales = codes, scales
        return module

    @property
    def tied(self) -> Int8Embedding | None:
        """The embedding whose tensors the head shares, or None."""
        return self._tied[0]

    @property
    def in_features(self) -> int:
        """The width d."""
        return self.layout.columns

    @property
    def out_features(self) -> int:
        """The vocabulary V."""
        return self.layout.rows

    def to_dense(self, dtype: torch.dtype, weight: nn.Parameter | None = None) -> nn.Linear:
        """A dense head with the rounded weight, or with this one: that of a tied embedding, made dense before."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=False)
        if weight is None:
            weight = nn.Parameter(dequantize_rows(*self._rows(), dtype), requires_grad=False)
        dense.weight = weight
        dense.register_parameter("bias", self.bias)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d) to y (..., V), in the dtype of x; half precision is computed in float32 on a CPU.

        A few tokens are multiplied by the codes as they are. Otherwise, a tile of rows of the dense W exists at a time.
        """
        codes, scales = self._rows()
        inputs = x.reshape(-1, x.shape[-1]).to(codes.device)  # a tied head's may be on another GPU than its inputs
        kernel = rows if rows.suits(inputs) else row_tiles
        y = kernel.multiply(inputs, codes, scales).to(x.device)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, in the printed model."""
        tied = self.tied is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=8, tied={tied}"

    def _rows(self) -> tuple[Tensor, Tensor]:
        owner = self.tied or self
        return owner.get_buffer("codes"), owner.get_buffer("scales")


def _register_rows(module: Int8Embedding | Int8Linear, device: torch.device) -> None:
    for name, (dtype, shape) in module.layout.tensors().items():
        module.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
