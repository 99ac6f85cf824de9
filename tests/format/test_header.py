import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from arbllm.errors import CheckpointError
from arbllm.format.header import LENGTH_BYTES, order_metadata, read_header

TENSORS = {"a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b": torch.ones(5)}
METADATA = {name: name * 3 for name in "zyxwvu"}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors", metadata=METADATA)
    return tmp_path / "t.safetensors"


def change(file, alter):
    octets = file.read_bytes()
    length = int.from_bytes(octets[:LENGTH_BYTES], "little")
    header = json.loads(octets[LENGTH_BYTES : LENGTH_BYTES + length])
    alter(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(LENGTH_BYTES, "little") + text + octets[LENGTH_BYTES + length :])


def test_a_header_is_read(file):
    metadata, tensors = read_header(file)
    assert metadata == METADATA
    assert {name: (stored.dtype, stored.shape, stored.nbytes) for name, stored in tensors.items()} == {
        "a": ("I16", (2, 3), 12),
        "b": ("F32", (5,), 20),
    }


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda header: header["a"].update(dtype="I32"), "tensor a of I32 .* takes 24 bytes, but has 12"),
        (lambda header: header["a"].update(dtype="X9"), "tensor a is of the unknown dtype X9"),
        (lambda header: header["a"].update(shape=[2, -3]), "tensor a: its entry"),
        (lambda header: header["a"].update(shape=[2**62, 2**62]), "tensor a of I16"),
        (lambda header: header["b"].update(data_offsets=[4, 24]), "tensor"),
        (lambda header: header.pop("b"), "tensor a does not begin where"),
        (lambda header: header.pop("a"), "has 12 bytes that belong to no tensor"),
        (lambda header: header.update(a=3), "tensor a: its entry"),
        (lambda header: header.update(__metadata__=[1]), "header is not readable"),
        (lambda header: header["__metadata__"].update(z=1), "header is not readable"),
    ],
)
def test_what_cannot_be_is_named(file, alter, message):
    change(file, alter)
    with pytest.raises(CheckpointError, match=rf"t\.safetensors: .*{message}|t\.safetensors: {message}"):
        read_header(file)


def test_metadata_in_order(file):
    before = file.read_bytes()
    order_metadata(file)
    assert len(file.read_bytes()) == len(before)
    metadata, _ = read_header(file)
    assert list(metadata) == sorted(METADATA)
    assert metadata == METADATA
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(file).items())
