import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arbllm.errors import CheckpointError
from arbllm.format.checkpoint import (
    CHECKSUMS_KEY,
    FORMAT_VERSION,
    bytes_on_disk,
    file_metadata,
    linear_layouts,
    open_checkpoint,
    verify,
)
from arbllm.format.checksum import checksum
from tests.helpers import random_matrix

MATRIX = random_matrix(8, 40, salient=5, block_size=16, row_means=True)


def write(directory, *, matrix=MATRIX, shards=1, change_tensors=None, change_config=None):
    """A checkpoint of one packed linear and an embedding; the changes come after the checksums were taken."""
    linears = {"proj": {**matrix.layout.to_dict(), "bias": False, "transposed": False}}
    tensors = {f"proj.{name}": tensor for name, tensor in matrix.tensors().items()}
    tensors["embed.weight"] = torch.randn(6, 40, dtype=torch.bfloat16)
    metadata = file_metadata(tensors, linears)
    if change_tensors:
        change_tensors(tensors)
    parts = [sorted(tensors)[index::shards] for index in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / file, metadata=metadata)
    if shards > 1:
        index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"quant_method": "arbllm", "format_version": FORMAT_VERSION, "linears": linears}
    if change_config:
        change_config(config)
    (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    return directory


def flip(file: Path, offset: int) -> None:
    octets = bytearray(file.read_bytes())
    octets[offset] ^= 0x10
    file.write_bytes(octets)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sound_checkpoint_verifies(tmp_path, shards):
    verify(write(tmp_path, shards=shards))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.layouts == {"proj": MATRIX.layout}
    assert len(checkpoint.files) == shards
    assert checkpoint.size.linears.nbytes == MATRIX.nbytes
    assert checkpoint.size.embeddings == 2 * 6 * 40
    assert bytes_on_disk(tmp_path) == sum(file.stat().st_size for file in checkpoint.files)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", [*(f"proj.{name}" for name in MATRIX.tensors()), "embed.weight"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_flipped_byte_is_named(tmp_path, shards, name, end):
    stored = open_checkpoint(write(tmp_path, shards=shards)).tensors[name]
    flip(stored.file, stored.start if end == "first" else stored.end - 1)
    open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"{stored.file.name}: tensor {name} does not match its checksum"):
        verify(tmp_path)


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    sound = file.read_bytes()
    for offset in range(0, len(sound), 7):
        flip(file, offset)
        with pytest.raises(CheckpointError):
            verify(tmp_path)
        file.write_bytes(sound)
    verify(tmp_path)


def test_no_truncation_goes_unnoticed(tmp_path):
    stored = open_checkpoint(write(tmp_path)).tensors
    file = tmp_path / "model.safetensors"
    sound = file.read_bytes()
    for length in range(0, len(sound), 97):
        file.write_bytes(sound[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cut off"):
            verify(tmp_path)
    last = max(stored, key=lambda name: stored[name].end)
    file.write_bytes(sound[:-1])
    with pytest.raises(CheckpointError, match=f"cut off before the end of tensor {last}"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["proj.signs", "proj.column_bitmap", "embed.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    write(tmp_path, change_tensors=lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensor: tensor.reshape(4, -1), r"F16 \[4, "),
        (lambda tensor: tensor.float(), r"F32 \[8, "),
        (lambda tensor: tensor.view(torch.bfloat16), r"BF16 \[8, "),
    ],
)
def test_a_misshapen_tensor_is_named(tmp_path, change, found):
    def misshape(tensors):
        tensors["proj.row_scales"] = change(tensors["proj.row_scales"])

    write(tmp_path, change_tensors=misshape)
    with pytest.raises(CheckpointError, match=rf"tensor proj\.row_scales should be F16 \[8, \d+\], but is {found}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("ordering", ["natural", "segments", "explicit"])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_every_kind_of_tensor_is_checked(tmp_path, ordering, scale_bits):
    matrix = random_matrix(8, 40, groups=4, salient=5, block_size=16, scale_bits=scale_bits, ordering=ordering)
    verify(write(tmp_path, matrix=matrix))
    assert open_checkpoint(tmp_path).size.linears.nbytes == matrix.nbytes
    for name in matrix.tensors():
        write(tmp_path, matrix=matrix, change_tensors=lambda tensors, name=name: tensors.pop(f"proj.{name}"))
        with pytest.raises(CheckpointError, match=rf"tensor proj\.{name} is missing"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("ordering", "name"), [("explicit", "column_order"), ("bitmap", "column_bitmap"), ("segments", "column_segments")]
)
def test_an_impossible_column_order_is_named(tmp_path, ordering, name):
    matrix = random_matrix(8, 40, salient=5, block_size=16, ordering=ordering)
    matrix.tensors()[name].view(-1)[0] ^= 1
    open_checkpoint(write(tmp_path, matrix=matrix))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor proj\.{name} does not"):
        verify(tmp_path)


def test_a_tensor_without_checksum_is_named(tmp_path):
    write(tmp_path, change_tensors=lambda tensors: tensors.update(extra=torch.zeros(3)))
    with pytest.raises(CheckpointError, match="tensor extra has no checksum"):
        open_checkpoint(tmp_path)


def test_files_without_checksums_are_refused(tmp_path):
    file = write(tmp_path) / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has no checksums"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", [1, 3])
def test_a_missing_shard_is_named(tmp_path, shard):
    name = f"model-{shard:05}-of-00003.safetensors"
    (write(tmp_path, shards=3) / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        verify(tmp_path)


def test_shards_of_two_checkpoints_do_not_mix(tmp_path):
    write(tmp_path, shards=3)
    name = "model-00001-of-00003.safetensors"
    mixed = (tmp_path / name).read_bytes()
    write(tmp_path, shards=3)
    (tmp_path / name).write_bytes(mixed)
    with pytest.raises(CheckpointError, match=r"tensor embed\.weight does not match its checksum"):
        verify(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_a_version_from_the_future_is_refused(tmp_path, version):
    write(tmp_path, change_config=lambda config: config.update(format_version=version))
    with pytest.raises(CheckpointError, match=rf"version {version}, this release .* upgrade arbllm"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_earlier_versions_are_refused(tmp_path, version):
    write(tmp_path, change_config=lambda config: config.update(format_version=version))
    message = rf"format version {version}, .* reads version {FORMAT_VERSION} alone; quantize the model again"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True])
def test_a_version_must_be_a_number(tmp_path, version):
    write(tmp_path, change_config=lambda config: config.update(format_version=version))
    with pytest.raises(CheckpointError, match="format_version must be a positive whole number"):
        open_checkpoint(tmp_path)


def test_changed_layouts_are_noticed(tmp_path):
    write(tmp_path, change_config=lambda config: config["linears"]["proj"].update(block_size=17))
    with pytest.raises(CheckpointError, match=r"its linears are not those that .* was written with"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"config\.json: missing"),
        (lambda path: (path / "config.json").write_text("{"), r"config\.json: not readable as a JSON object"),
        (lambda path: (path / "config.json").write_text("[]"), r"config\.json: not readable as a JSON object"),
        (lambda path: (path / "config.json").write_text("{}"), "is not a packed checkpoint"),
        (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "cut off inside its header"),
        (lambda path: (path / "model.safetensors").write_bytes(bytes(80)), "its header is not readable"),
    ],
)
def test_unreadable_files_are_named(tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("linears", [None, {}, []])
def test_a_config_without_linears_is_refused(tmp_path, linears):
    file = write(tmp_path, change_config=lambda config: config.update(linears=linears)) / "model.safetensors"
    save_file(load_file(file), file, metadata=file_metadata(load_file(file), linears))
    with pytest.raises(CheckpointError, match="lists no packed linears"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("option", ["bias", "transposed"])
def test_a_linear_that_is_not_fully_described_is_named(option):
    options = {"bias": False, "transposed": False, **random_matrix(4, 8).layout.to_dict()}
    del options[option]
    with pytest.raises(CheckpointError, match=r"the linear model\.head is not described as arbllm does"):
        linear_layouts({"linears": {"model.head": options}})


def test_checksum_is_of_bytes_in_row_major_order():
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    assert checksum(tensor.T) == checksum(tensor.T.contiguous()) != checksum(tensor)
    assert checksum(torch.tensor(1.0)) == checksum(torch.tensor([1.0]))
    assert checksum(torch.zeros(0)) == "2d06800538d394c2"  # xxh3_64 of nothing, as its specification has it
    metadata = file_metadata({"a": tensor}, {})
    assert json.loads(metadata[CHECKSUMS_KEY]) == {"a": checksum(tensor)}


def test_bytes_on_disk_of_a_file_and_of_a_bin_directory(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(10))
    assert bytes_on_disk(tmp_path) == bytes_on_disk(tmp_path / "pytorch_model.bin") == 10
