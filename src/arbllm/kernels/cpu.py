"""The CPU kernel: products straight from the bits in the C++ extension, or the vendor's product of many tokens.

How a matrix is prepared for it, and what it computes, is described in csrc/lookup.h. Up to `most_tokens` tokens, and
where an exact product is not asked for, entries of tables or activations are rounded to 8 bits, which makes an error of
under 1 % of the output, or, where that is faster, factors to bfloat16. More tokens are multiplied in bfloat16, as a
dense layer would, if they are given so, or in float32 and PyTorch's settings allow it (`rounds_many`): from the bits as
well where the kernel has instructions for that, else as all others are, by tiles of the unpacked weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from arbllm.binarize.code import COEFFICIENTS, PRODUCTS
from arbllm.errors import ConfigError
from arbllm.format.layout import TRELLIS_TERM_COUNTS
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.trellis import FURTHER_SIGNS
from arbllm.kernels import reference
from arbllm.native import load

TILE_BYTES = 2**24
"""Of weights that are unpacked at a time for many tokens."""
ALIGNMENT = 64

_DIRECT = (torch.float32, torch.bfloat16)  # other dtypes are converted first

_library = torch.library.Library("arbllm", "FRAGMENT")
_library.define("cpu_matmul(Tensor x, Tensor prepared, int rows, bool exact, int instruction_set) -> Tensor")


@cache
def native() -> ModuleType | None:
    """The C++ extension, or None, with a warning, if it was not built."""
    module = load()
    if module is None:
        warnings.warn(
            "arbllm was installed without its C++ kernels, so packed layers compute with PyTorch alone, which is "
            "several times slower; install a C++ compiler, then arbllm again",
            stacklevel=3,
        )
    return module


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the extension was built; says so, once, if not."""
    return native() is not None


def instruction_sets() -> list[str]:
    """Instruction sets that this processor has and the kernel knows, the best first; none without the extension."""
    module = native()
    return module.instruction_sets() if module else []


@cache
def most_tokens(instruction_set: int = 0) -> int:
    """Tokens that may be rounded whatever their dtype, by the number of an instruction set; the best one by default."""
    return int(native_module().most_tokens(instruction_set))


@cache
def takes_more(instruction_set: int = 0) -> bool:
    """Whether products of more tokens come from the bits as well, in bfloat16."""
    return bool(native_module().takes_more(instruction_set))


def rounds_many(dtype: torch.dtype) -> bool:
    """Whether inputs of this dtype, more than `most_tokens`, may be rounded to bfloat16.

    Those in float32 after `torch.set_float32_matmul_precision("medium")`, or where the newer setting of PyTorch's
    products on a CPU, `torch.backends.mkldnn.matmul.fp32_precision`, is `bf16`.
    """
    if dtype == torch.bfloat16:
        return True
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # a newer setting was made, which the older one does not tell
        return bool(torch.backends.mkldnn.matmul.fp32_precision == "bf16")  # type: ignore[attr-defined]  # made late


def prepare(matrix: BinaryMatrix) -> Tensor:
    """The matrix as the kernel reads it: bytes, uint8, of about the size of the packed tensors.

    Args:
        matrix: its tensors are on the CPU.

    Raises:
        ValueError: they are not.
    """
    layout, stored = matrix.layout, {name: tensor.contiguous() for name, tensor in matrix.tensors().items()}
    if not all(tensor.is_cpu for tensor in stored.values()):
        raise ValueError(f"the packed weight is on {matrix.signs.device}, its input on the CPU; move one to the other")
    row_scales, column_scales = (None if scales is None else scales.contiguous() for scales in matrix.scales())
    row_means = stored["row_means"].float() if layout.row_means else None
    order = matrix.column_order()
    planes = [stored.get(name) for name in ("signs", "group_bitmap", "group_bitmap_high", *FURTHER_SIGNS)]
    packed = native_module().Packed.at(
        layout.rows,
        layout.columns,
        [[*place.segment, *place[1:]] for place in layout.places],
        [_address(plane) for plane in planes],
        [0 if plane is None else plane.shape[1] for plane in planes],
        [_summands(terms) for terms in TRELLIS_TERM_COUNTS],
        *map(_address, (row_scales, row_means, column_scales, order)),
    )
    size = packed.prepared_bytes()
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT
    packed.prepare(memory.data_ptr() + start, torch.get_num_threads())
    return memory[start : start + size]


def give_back(matrix: BinaryMatrix) -> int:
    """Leave the tensors of a matrix to the file that they are mapped from, to be read again when they are next used.

    What is prepared needs them no more, and so the matrix is in memory once. On Linux alone; tensors that were not
    mapped from a file, or were written to since, stay as they are.

    Returns:
        Bytes of memory that became free.
    """
    return sum(native_module().give_back(tensor.data_ptr(), tensor.nbytes) for tensor in matrix.tensors().values())


def _summands(terms: int) -> list[tuple[int, float]]:
    """Of the levels of weights of so many stored signs: which signs are multiplied, as bits, and the coefficient."""
    alone = [(1 << place, coefficient) for place, coefficient in enumerate(COEFFICIENTS[terms])]
    return alone + [(sum(1 << place for place in places), c) for places, c in PRODUCTS[terms].items()]


def multiply(
    x: Tensor, prepared: Tensor, rows: int, *, exact: bool = False, instruction_set: str | None = None
) -> Tensor:
    """Multiply by a prepared weight: y = x W^T.

    Args:
        x: (..., m) of any floating dtype and any strides.
        prepared: from `prepare`.
        rows: n.
        exact: whether all arithmetic is to be in float32, however few the tokens.
        instruction_set: one of `instruction_sets`; None for the best.

    Returns:
        (..., n) in the dtype of x.

    Raises:
        ConfigError: this processor does not have the instruction set.
        ValueError: x has another number of columns than the weight, or is not of floating point.
    """
    chosen = 0 if instruction_set is None else instruction_set_number(instruction_set)
    # Without a compiler or a mode that watches, a direct call saves half of the time that a small product takes, and
    # sizes one by one a microsecond.
    plain = type(x) is Tensor and not torch.compiler.is_compiling() and not x.is_neg() and not x._is_zerotensor()
    if plain and not exact and x.dtype in _DIRECT and x.is_contiguous() and (size := x.numel()) and (shape := x.shape):
        *before, columns = shape
        tokens = size // columns
        if tokens <= most_tokens(chosen):
            return _from_bits(x, x.new_empty(*before, rows), prepared, (tokens, columns, rows), columns, chosen)
    reference.check_kind(x)
    rows_of_x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = (_compute if plain else torch.ops.arbllm.cpu_matmul)(rows_of_x, prepared, rows, exact, chosen)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def multiply_transposed(y: Tensor, prepared: Tensor, columns: int) -> Tensor:
    """Multiply by a prepared weight the other way, as gradients go: x = y W, in float32.

    Args:
        y: (..., n) of any floating dtype and any strides.
        prepared: from `prepare`.
        columns: m.

    Returns:
        (..., m) in the dtype of y.
    """
    rows = y.shape[-1]
    given = y.reshape(-1, rows).float()
    ordered = given.new_zeros(len(given), columns)
    for tile, weight in _tiles(prepared, rows, columns, torch.float32, instruction_set=0):
        with torch.autocast("cpu", enabled=False):
            ordered.addmm_(given[:, tile], weight[:, : tile.stop - tile.start].T)
    x = torch.empty_like(ordered).index_copy_(1, order(prepared, columns).long(), ordered)
    return x.view(*y.shape[:-1], columns).to(y.dtype)


def matmul(x: Tensor, matrix: BinaryMatrix) -> Tensor:
    """Multiply by the packed weight, y = x W^T, in float32; the matrix is prepared anew each time."""
    if not available() or x.dtype == torch.float64:
        return reference.matmul(x, matrix)
    return multiply(x, prepare(matrix), matrix.layout.rows, exact=True)


def instruction_set_number(instruction_set: str) -> int:
    """Its place in `instruction_sets`.

    Raises:
        ConfigError: this processor does not have it.
    """
    known = instruction_sets()
    if instruction_set not in known:
        raise ConfigError(f"instruction set {instruction_set!r} is not available; choose one of {', '.join(known)}")
    return known.index(instruction_set)


def native_module() -> ModuleType:
    """The C++ extension.

    Raises:
        ConfigError: it was not built.
    """
    module = native()
    if module is None:
        raise ConfigError("arbllm was installed without its C++ kernels; install a C++ compiler, then arbllm again")
    return module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@torch.library.impl(_library, "cpu_matmul", "CPU")
def _compute(x: Tensor, prepared: Tensor, rows: int, exact: bool, instruction_set: int) -> Tensor:
    if x.dtype not in _DIRECT:
        return _compute(x.float(), prepared, rows, exact, instruction_set).to(x.dtype)
    tokens = x.shape[0]
    if not tokens:
        order(prepared, x.shape[1])  # refuses another width
    if exact or tokens > most_tokens(instruction_set):
        half = not exact and native_module().MULTIPLIES_BFLOAT16 and rounds_many(x.dtype)
        if not (half and takes_more(instruction_set)):
            return _by_tiles(x, prepared, rows, torch.bfloat16 if half else torch.float32, instruction_set)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(tokens, rows)
    sizes = (tokens, x.shape[1], rows)
    return _from_bits(x, y, prepared, sizes, x.stride(0), instruction_set) if tokens else y


def _from_bits(
    x: Tensor, y: Tensor, prepared: Tensor, sizes: tuple[int, int, int], stride: int, instruction_set: int
) -> Tensor:
    """Put x W^T into y from the bits; `sizes` are tokens, columns and rows, x has a token every `stride` elements."""
    native_module().multiply(
        prepared.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        *sizes,
        stride,
        x.dtype == torch.bfloat16,
        takes_more(instruction_set),
        instruction_set,
        torch.get_num_threads(),
    )
    return y


@torch.library.impl(_library, "cpu_matmul", "Meta")
def _fake(x: Tensor, prepared: Tensor, rows: int, exact: bool, instruction_set: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _by_tiles(x: Tensor, prepared: Tensor, rows: int, dtype: torch.dtype, instruction_set: int) -> Tensor:
    """y = x W^T, a tile of rows unpacked at a time, multiplied in this dtype."""
    ordered = _in_order(x.to(dtype), prepared)
    y = x.new_empty(x.shape[0], rows)
    for tile, weight in _tiles(prepared, rows, x.shape[1], dtype, instruction_set):
        with torch.autocast("cpu", enabled=False):
            y[:, tile] = (ordered @ weight)[:, : tile.stop - tile.start]
    return y


def _in_order(x: Tensor, prepared: Tensor) -> Tensor:
    """x (tokens, m) in float32 or bfloat16 with its columns in the prepared order."""
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    sizes, half = (*x.shape, x.stride(0)), x.dtype == torch.bfloat16
    native_module().put_in_order(prepared.data_ptr(), x.data_ptr(), y.data_ptr(), *sizes, half, torch.get_num_threads())
    return y


def _tiles(
    prepared: Tensor, rows: int, columns: int, dtype: torch.dtype, instruction_set: int
) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of rows, and their weights, (m, rows or more), columns in prepared order; for use one by one."""
    module, address = native_module(), prepared.data_ptr()
    lanes = module.LANES
    blocks, step = -(-rows // lanes), max(1, TILE_BYTES // (dtype.itemsize * lanes * columns))
    memory = torch.empty(columns * lanes * min(step, blocks), dtype=dtype, device="cpu")
    half, threads = dtype == torch.bfloat16, torch.get_num_threads()
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        weight = memory[: columns * lanes * (last - first)].view(columns, -1)
        module.unpack(address, columns, first, last, weight.data_ptr(), half, instruction_set, threads)
        yield slice(lanes * first, min(lanes * last, rows)), weight


def order(prepared: Tensor, columns: int) -> Tensor:
    """The natural column of each prepared one, int32 (m); shares memory with `prepared`.

    Raises:
        ValueError: that has another number of columns.
    """
    start = native_module().order(prepared.data_ptr(), columns) - prepared.data_ptr()
    return prepared[start : start + 4 * columns].view(torch.int32)
