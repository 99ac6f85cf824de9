"""Packed checkpoints on disk: what must be in them, and checksums.

`docs/format.md` describes the files byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arbllm.errors import CheckpointError, ConfigError
from arbllm.format.accounting import ModelSize, StorageSize, matrix_size, model_size
from arbllm.format.checksum import canonical, canonical_checksum, checksum, config_checksum
from arbllm.format.coding import RAW, check_coding, coded_planes, decode, is_possible_size
from arbllm.format.header import DAMAGED, StoredTensor, parse_object, read_header
from arbllm.format.layout import Layout
from arbllm.format.matrix import ORDER_TENSORS, check_order
from arbllm.format.rows import RowLayout, row_layouts

FORMAT_VERSION = 3
QUANT_METHOD = "arbllm"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHECKSUMS_KEY = "arbllm.checksums"
LINEARS_KEY = "arbllm.linears"
EMBEDDINGS_KEY = "arbllm.embeddings"
CONFIG_KEY = "arbllm.config"
DENSE_KEY = "arbllm.dense"
MODULE_OPTIONS = ("bias", "transposed")

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class Checkpoint:
    """A packed checkpoint whose structure was found sound; no tensor was read yet.

    Attributes:
        quantization: `quantization_config` of config.json.
        layouts: layout of every packed linear by module name.
        embeddings: layout of every embedding and head in 8 bits by module name.
        bitmap: how group bitmaps are stored, one of `arbllm.format.coding.CODINGS`.
        tensors: every stored tensor by name, packed and dense.
        checksums: checksum of every stored tensor by name.
    """

    quantization: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    embeddings: Mapping[str, RowLayout]
    bitmap: str
    tensors: Mapping[str, StoredTensor]
    checksums: Mapping[str, str]

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def size(self) -> ModelSize:
        """What it stores, in bytes."""
        stored = {name: (tensor.shape, tensor.nbytes) for name, tensor in self.tensors.items()}
        return model_size(self.layouts, stored, self.embeddings)

    def matrix_size(self, module: str) -> StorageSize:
        """What one packed linear takes in the files."""
        layout = self.layouts[module]
        return matrix_size(layout, {name: self.tensors[f"{module}.{name}"].nbytes for name in layout.tensors()})

    def verify_contents(self) -> None:
        """Read every tensor, compare its checksum, and see that column orders are such and coded bitmaps decode.

        Raises:
            CheckpointError: a tensor is not what was written, orders columns in no possible way, or codes no bitmap;
                names file and tensor.
        """
        checks = self._checks()
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in (name for name, stored in self.tensors.items() if stored.file == file):
                        tensor = reader.get_tensor(name)
                        if checksum(tensor) != self.checksums[name]:
                            raise CheckpointError(f"{file}: tensor {name} does not match its checksum; {DAMAGED}")
                        if name in checks:
                            checks[name](tensor, f"{file}: tensor {name}")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not readable ({error}); {DAMAGED}") from error

    def _checks(self) -> dict[str, Callable[[Tensor, str], object]]:
        """What tensors must satisfy beside their checksums, by name."""
        checks: dict[str, Callable[[Tensor, str], object]] = {}
        for module, layout in self.layouts.items():
            for key in ORDER_TENSORS:
                if key in layout.tensors():
                    checks[f"{module}.{key}"] = partial(check_order, layout)
            for key, width in coded_planes(layout, self.bitmap).items():
                checks[f"{module}.{key}"] = partial(_check_decodes, layout.rows, width, self.bitmap)
        return checks


def file_metadata(
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, Any],
    embeddings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Metadata for the safetensors files of a checkpoint, the same in each.

    Args:
        tensors: all tensors by the names that they get in the files.
        linears: `quantization_config["linears"]`.
        embeddings: `quantization_config["embeddings"]`; the entry for it is left out where there are none.
        config: config.json as it will be read again; None leaves out its entry.
    """
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    packed = {*(linears or ()), *(embeddings or ())}
    dense = {
        name: [_DTYPES[tensor.dtype], list(tensor.shape)]
        for name, tensor in tensors.items()
        if not _is_packed(name, packed) and tensor.dtype in _DTYPES
    }
    metadata = {CHECKSUMS_KEY: canonical(checksums), LINEARS_KEY: canonical_checksum(linears)}
    metadata[DENSE_KEY] = canonical(dense)
    metadata |= {EMBEDDINGS_KEY: canonical_checksum(embeddings)} if embeddings else {}
    return metadata | ({CONFIG_KEY: config_checksum(config)} if config else {})


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read config.json and the headers of a checkpoint directory, and check that all that must be there is.

    Raises:
        CheckpointError: not an arbllm checkpoint, of another format version, or damaged; names file and tensor.
    """
    path = Path(path).expanduser()
    config = _read_json(path / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{path} is not a packed checkpoint: its config.json names no arbllm quantization")
    if not (config.get("dtype") or config.get("torch_dtype")):  # transformers would guess from any packed tensor
        raise CheckpointError(f"{path / 'config.json'}: names no dtype for what is not packed; {DAMAGED}")
    files, index = _weight_files(path)
    checkpoint = check_structure(files, quantization)
    for file in files:
        if read_header(file)[0].get(CONFIG_KEY, config_checksum(config)) != config_checksum(config):
            raise CheckpointError(
                f"{path / 'config.json'}: is not the one that {file} was written with: other values describe the "
                f"model; {DAMAGED}"
            )
    for name, named in index.items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].file.name != named:
            raise CheckpointError(f"{path / INDEX_FILE}: tensor {name} is not in {named}; {DAMAGED}")
    return checkpoint


def check_structure(files: Sequence[Path], quantization: Mapping[str, Any]) -> Checkpoint:
    """Check the headers of safetensors files against `quantization_config`.

    Raises:
        CheckpointError: a tensor is missing, misshapen or without checksum, a file is unreadable, or the version is
            another than this; names file and tensor.
    """
    check_version(quantization)
    tensors: dict[str, StoredTensor] = {}
    checksums: dict[str, str] = {}
    dense: dict[str, Any] = {}
    for file in files:
        metadata, stored = read_header(file)
        checksums |= _read_checksums(file, metadata, quantization)
        dense |= parse_object(
            metadata.get(DENSE_KEY, ""), f"{file}: its {DENSE_KEY} is missing or not readable; {DAMAGED}"
        )
        for name in sorted(stored.keys() & tensors.keys()):
            raise CheckpointError(f"{file}: tensor {name} is in {tensors[name].file} as well; {DAMAGED}")
        tensors |= stored
    where = files[0] if len(files) == 1 else files[0].parent
    for name in sorted(checksums.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: tensor {name} is missing; download or copy the checkpoint again")
    for name in sorted(tensors.keys() - checksums.keys()):
        raise CheckpointError(f"{tensors[name].file}: tensor {name} has no checksum; it was not written by arbllm")
    for name, written in dense.items():
        found = _find(where, name, tensors)
        if [found.dtype, list(found.shape)] != written:
            raise CheckpointError(
                f"{found.file}: tensor {name} should be {written}, but is {[found.dtype, list(found.shape)]}; {DAMAGED}"
            )
    layouts = linear_layouts(quantization)
    embeddings = row_layouts(quantization)
    bitmap = bitmap_coding(quantization)
    for module, layout in layouts.items():
        coded = coded_planes(layout, bitmap)
        raw = {name: expected for name, expected in layout.tensors().items() if name not in coded}
        _check_tensors(where, module, raw, tensors)
        for name, width in coded.items():
            _check_coded(where, f"{module}.{name}", (layout.rows, width), bitmap, tensors)
    for module, rows in embeddings.items():
        _check_tensors(where, module, rows.tensors(), tensors)
    return Checkpoint(quantization, layouts, embeddings, bitmap, tensors, checksums)


def verify(path: Path | str) -> None:
    """Check a checkpoint directory whole: structure, then the checksum of every tensor.

    Raises:
        CheckpointError: what is wrong, naming file and tensor.
    """
    open_checkpoint(path).verify_contents()


def check_version(quantization: Mapping[str, Any]) -> None:
    """Refuse a format version that this release cannot read.

    Raises:
        CheckpointError: the version is another, or none.
    """
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"config.json: format_version must be a positive whole number, not {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"config.json: the checkpoint has format version {version}, this release of arbllm reads version "
            f"{FORMAT_VERSION}; upgrade arbllm"
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"config.json: the checkpoint has format version {version}, this release of arbllm reads version "
            f"{FORMAT_VERSION} alone; quantize the model again with: arbllm quantize"
        )


def linear_layouts(quantization: Mapping[str, Any]) -> dict[str, Layout]:
    """Layout of every packed linear by module name.

    Raises:
        CheckpointError: there are none, or one is unreadable; names the module.
    """
    linears = quantization.get("linears")
    if not isinstance(linears, dict) or not linears:
        raise CheckpointError("config.json: the quantization_config lists no packed linears")
    for module, options in linears.items():
        if not isinstance(options, dict) or not all(type(options.get(key)) is bool for key in MODULE_OPTIONS):
            raise CheckpointError(f"config.json: the linear {module} is not described as arbllm does: {options}")
    sizes = {
        module: {key: value for key, value in options.items() if key not in MODULE_OPTIONS}
        for module, options in linears.items()
    }
    return {module: Layout.from_dict(values, f"config.json: {module}") for module, values in sizes.items()}


def bitmap_coding(quantization: Mapping[str, Any]) -> str:
    """How the group bitmaps of a checkpoint are stored.

    Raises:
        CheckpointError: in a way that this release does not know.
    """
    coding = quantization.get("bitmap", RAW)
    try:
        check_coding(coding)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from error
    return str(coding)


def bytes_on_disk(path: Path | str) -> int:
    """Bytes of a model's weight files: of a directory the safetensors (or .bin) files, of a file itself."""
    path = Path(path).expanduser()
    if path.is_file():
        return path.stat().st_size
    files = [*path.glob("*.safetensors")] or [*path.glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a directory: one, or the shards of the index; and which of them has which tensor."""
    if (path / WEIGHTS_FILE).exists():
        return [path / WEIGHTS_FILE], {}
    if not (path / INDEX_FILE).exists():
        raise CheckpointError(f"{path / WEIGHTS_FILE}: missing; download or copy the checkpoint again")
    index = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path / INDEX_FILE}: lists no files; {DAMAGED}")
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise CheckpointError(
                f"{path / INDEX_FILE}: tensor {name} is in no file beside it, but {file!r}; {DAMAGED}"
            )
    return sorted(path / name for name in set(index.values())), index


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; is {file.parent} a packed checkpoint?") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{file.parent}: is a file; give the directory of the checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); {DAMAGED}") from error
    return parse_object(text, f"{file}: not readable as a JSON object; {DAMAGED}")


def _read_checksums(file: Path, metadata: Mapping[str, str], quantization: Mapping[str, Any]) -> dict[str, str]:
    """The checksums in a file's metadata, after checking that config.json is the one written with the file."""
    if CHECKSUMS_KEY not in metadata or LINEARS_KEY not in metadata:
        raise CheckpointError(f"{file}: has no checksums; it was not written by arbllm, or is damaged")
    embeddings = quantization.get("embeddings")
    for key, what, found in (
        (LINEARS_KEY, "linears", canonical_checksum(quantization.get("linears"))),
        (EMBEDDINGS_KEY, "embeddings", canonical_checksum(embeddings) if embeddings else None),
    ):
        if metadata.get(key) != found:
            raise CheckpointError(f"config.json: its {what} are not those that {file} was written with; {DAMAGED}")
    return parse_object(metadata[CHECKSUMS_KEY], f"{file}: its checksums are not readable; {DAMAGED}")


def _check_tensors(
    where: Path,
    module: str,
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Check the tensors of one packed module."""
    for key, (dtype, shape) in expected.items():
        name = f"{module}.{key}"
        found = _find(where, name, tensors)
        if (found.dtype, found.shape) != (_DTYPES[dtype], shape):
            raise CheckpointError(
                f"{found.file}: tensor {name} should be {_DTYPES[dtype]} {list(shape)}, "
                f"but is {found.dtype} {list(found.shape)}; {DAMAGED}"
            )


def _check_coded(
    where: Path, name: str, shape: tuple[int, int], coding: str, tensors: Mapping[str, StoredTensor]
) -> None:
    """Check the size of a coded plane of so many rows and columns."""
    found = _find(where, name, tensors)
    if (found.dtype, found.shape) != ("U8", (found.nbytes,)) or not is_possible_size(found.nbytes, *shape, coding):
        raise CheckpointError(
            f"{found.file}: tensor {name} should be {list(shape)} bits as {coding} codes them, "
            f"but is {found.dtype} {list(found.shape)}; {DAMAGED}"
        )


def _check_decodes(rows: int, width: int, coding: str, coded: Tensor, name: str) -> None:
    """Refuse a coded plane that stands for none; the message begins with `name`."""
    decode(coded, rows, width, coding, name)


def _is_packed(name: str, modules: Container[str]) -> bool:
    """Whether a layout says what a tensor is like: that of a packed module, but for biases."""
    module, _, key = name.rpartition(".")
    return module in modules and key != "bias"


def _find(where: Path, name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    if name not in tensors:
        raise CheckpointError(f"{where}: tensor {name} is missing; download or copy the checkpoint again")
    return tensors[name]
