"""Damages a small checkpoint in thousands of ways: each copy loads as it was written, or is refused by name.

python benchmarks/fuzz.py --cases 2000
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import arbllm
from arbllm.device import peak_memory_bytes, reset_peak_memory
from arbllm.errors import CheckpointError
from arbllm.format.checkpoint import LINEARS_KEY, open_checkpoint
from arbllm.format.checksum import canonical_checksum
from arbllm.format.header import BYTES_OF_DTYPE, LENGTH_BYTES
from arbllm.integrations.transformers import mark_packed
from arbllm.model.embeddings import quantize_embeddings
from arbllm.model.quantize import quantize_model

Octets = bytearray
Contents = dict[str, Any]
VALUES: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**62,
    2**64,
    10**30,
    1.5,
    True,
    None,
    "",
    "16",
    [],
    {},
    [[1, 2, 1, False]],
    [1] * 9,
)
HOSTILE_TEXTS = (b"", b"null", b"[]", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 5000, b'{"a": NaN}')


@dataclass
class Outcome:
    """What became of the damaged copies.

    Attributes:
        refused: by kind of damage, how many were refused with a CheckpointError that names what it should.
        sound: by kind of damage, how many held all that was written all the same.
        accepted: checkpoints whose layouts were forged, checksums included, to ones that the same tensors fit.
        slowest: processor time of the slowest case, in seconds.
        memory: growth of the peak resident memory over all cases, in bytes.
    """

    refused: Counter[str] = field(default_factory=Counter)
    sound: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    slowest: float = 0.0
    memory: int = 0

    @property
    def cases(self) -> int:
        """How many in all."""
        return self.refused.total() + self.sound.total() + self.accepted


def make_checkpoints(directory: Path) -> list[Path]:
    """Three small checkpoints: as by default; four groups, range-coded, embeddings in 8 bits; several files."""
    kinds = {
        "joint": (arbllm.BinarizationConfig(iterations=1, allocation="uniform"), "raw", 16, "50GB"),
        "paper": (arbllm.BinarizationConfig("arb-rc", groups=4, block_size=16, iterations=1), "entropy", 8, "50GB"),
        "shards": (arbllm.BinarizationConfig("arb", block_size=16, iterations=1), "csr", 16, 8000),
    }
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, (config, bitmap, bits, shard) in kinds.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=1, **sizes)).eval()
        quantize_embeddings(model, bits)
        quantize_model(model, torch.randint(40, (2, 24)), config)
        mark_packed(model, {"binarization": config.to_dict(), "bitmap": bitmap})
        model.save_pretrained(directory / name, max_shard_size=shard)
    return [directory / name for name in kinds]


def contents(path: Path) -> Contents:
    """All that a checkpoint tells, after checking it whole."""
    found = open_checkpoint(path)
    found.verify_contents()
    tensors = {
        name: (stored.dtype, stored.shape, stored.file.read_bytes()[stored.start : stored.end])
        for name, stored in found.tensors.items()
    }
    return {"layouts": found.layouts, "embeddings": found.embeddings, "bitmap": found.bitmap, "tensors": tensors}


def loaded(path: Path) -> Contents:
    """All tensors of the model that a checkpoint loads as, and what it computes."""
    model = arbllm.load(path)
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    return {name: tensor.numpy().tobytes() for name, tensor in (model.state_dict() | {"logits": logits}).items()}


def damage_byte(octets: Octets, chance: random.Random) -> None:
    """One byte changed anywhere."""
    octets[chance.randrange(len(octets))] ^= chance.randrange(1, 256)


def damage_run(octets: Octets, chance: random.Random) -> None:
    """Up to 64 bytes overwritten."""
    start = chance.randrange(len(octets))
    stop = min(len(octets), start + chance.randrange(1, 65))
    octets[start:stop] = chance.choice([bytes(stop - start), chance.randbytes(stop - start)])


def damage_length(octets: Octets, chance: random.Random) -> None:
    """Cut off, lengthened, or bytes taken out."""
    start = chance.randrange(len(octets))
    if chance.random() < 0.6:
        del octets[start:]
    elif chance.random() < 0.5:
        octets += chance.randbytes(chance.randrange(1, 100))
    else:
        del octets[start : start + chance.randrange(1, 9)]


def damage_text(octets: Octets, chance: random.Random) -> None:
    """The whole file, or the header alone, becomes hostile text or has another length."""
    text = chance.choice(HOSTILE_TEXTS)
    if chance.random() < 0.3:
        octets[:LENGTH_BYTES] = chance.choice([chance.randbytes(8), (2**63).to_bytes(8, "little"), bytes(8)])
    elif chance.random() < 0.5:
        octets[:] = text
    else:
        octets[:] = len(text).to_bytes(LENGTH_BYTES, "little") + text + octets[LENGTH_BYTES:]


def damage_header(octets: Octets, chance: random.Random) -> None:
    """Names, dtypes, shapes, offsets or metadata of a safetensors header; its length is put right."""
    length = int.from_bytes(octets[:LENGTH_BYTES], "little")
    header = json.loads(octets[LENGTH_BYTES : LENGTH_BYTES + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    key = chance.choice(["dtype", "shape", "data_offsets", "name", "entry", "metadata"])
    if key == "dtype":
        entry["dtype"] = chance.choice([*BYTES_OF_DTYPE, *VALUES, "F4", "Q8"])
    elif key in ("shape", "data_offsets"):
        values = entry[key]
        place = chance.randrange(len(values)) if values else 0
        entry[key] = chance.choice(
            [
                values[::-1],
                [*values, 1],
                values[1:],
                [1] * 70 + values,
                [*values[:place], chance.choice(VALUES), *values[place + 1 :]],
                [0, 2**62],
                chance.choice(VALUES),
            ]
        )
    elif key == "name":
        header[chance.choice([name[:-1], name + "x", "", "\ud800", "a" * 10_000])] = header.pop(name)
    elif key == "entry":
        other = chance.choice([key for key in header if key != "__metadata__"])
        header[name] = chance.choice([header[other], chance.choice(VALUES)])
    else:
        part = chance.choice(list(header["__metadata__"]))
        header["__metadata__"][part] = chance.choice([*VALUES, "{}", "[]", '{"a": 1}', "0" * 16, "[" * 100_000])
    text = json.dumps(header).encode()
    octets[:] = len(text).to_bytes(LENGTH_BYTES, "little") + text + octets[LENGTH_BYTES + length :]


def damage_json(octets: Octets, chance: random.Random) -> None:
    """A value of config.json or of the index, on any level, taken out or changed."""
    values = json.loads(octets)
    place = values
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.15:
            break
        place = place[key]
    if chance.random() < 0.2:
        del place[key]
    else:
        place[key] = chance.choice([*VALUES, "../other", "/etc/passwd", "\0"])
    octets[:] = json.dumps(values).encode()


def forge(files: dict[str, Octets], chance: random.Random) -> None:
    """A layout in config.json changed, and its checksum put right everywhere: only sizes can give it away."""
    config = json.loads(files["config.json"])
    linears = config["quantization_config"]["linears"]
    layout = linears[chance.choice(list(linears))]
    key = chance.choice(list(layout))
    layout[key] = chance.choice([*VALUES, "explicit", "segments", "bitmap", False, 8])
    if key == "segments" and chance.random() < 0.7:
        layout[key] = [
            [
                chance.choice([0, 1, 8, layout["columns"], 2**40]),
                chance.choice([1, 2, 4]),
                chance.choice([1, 2, 3, 4]),
                chance.choice([False, True]),
            ]
        ]
    files["config.json"][:] = json.dumps(config).encode()
    for name, octets in files.items():
        if name.endswith(".safetensors"):
            length = int.from_bytes(octets[:LENGTH_BYTES], "little")
            header = json.loads(octets[LENGTH_BYTES : LENGTH_BYTES + length])
            header["__metadata__"][LINEARS_KEY] = canonical_checksum(linears)
            text = json.dumps(header).encode()
            octets[:] = len(text).to_bytes(LENGTH_BYTES, "little") + text + octets[LENGTH_BYTES + length :]


DAMAGES: dict[str, Callable[[Octets, random.Random], None]] = {
    "byte": damage_byte,
    "run": damage_run,
    "length": damage_length,
    "text": damage_text,
    "header": damage_header,
    "json": damage_json,
}
FORGED = "forged"


def damage(files: dict[str, Octets], chance: random.Random) -> str:
    """Damage a checkpoint's files in memory; returns the kind of damage."""
    kind = chance.choices([*DAMAGES, FORGED], [4, 2, 3, 1, 6, 4, 2])[0]
    if kind == FORGED:
        forge(files, chance)
        return kind
    wanted = {"header": ".safetensors", "json": ".json"}.get(kind, "")
    DAMAGES[kind](files[chance.choice([name for name in files if name.endswith(wanted)])], chance)
    return kind


def fuzz(checkpoints: list[Path], read: Callable[[Path], Contents], cases: int, seed: int = 0) -> Outcome:
    """Damage checkpoints, in place but for the time of each case.

    Args:
        checkpoints: their directories.
        read: what tells all that a checkpoint holds, or raises CheckpointError.
        cases: how many copies.
        seed: of the damage.

    Raises:
        AssertionError: a copy was read as something else than was written, or its error names no file.
    """
    outcome, chance = Outcome(), random.Random(seed)
    expected = {path: read(path) for path in checkpoints}
    names = ("config.json", "model.safetensors.index.json")
    sound = {
        path: {
            file.name: file.read_bytes()
            for file in sorted(path.iterdir())
            if file.name in names or file.suffix == ".safetensors"
        }
        for path in checkpoints
    }
    reset_peak_memory()
    before = peak_memory_bytes()
    for _ in range(cases):
        path = chance.choice(checkpoints)
        files = {name: Octets(octets) for name, octets in sound[path].items()}
        kind = damage(files, chance)
        with _written(path, files, sound[path]):
            start = time.process_time()
            _judge(path, kind, read, expected[path], outcome)
            outcome.slowest = max(outcome.slowest, time.process_time() - start)
    outcome.memory = peak_memory_bytes() - before
    return outcome


def _judge(path: Path, kind: str, read: Callable[[Path], Contents], expected: Contents, outcome: Outcome) -> None:
    refusal, found = "", None
    try:
        found = read(path)
    except CheckpointError as error:
        refusal = str(error)
    if found is None:
        assert any(name in refusal for name in ("config.json", f"{path}/", f"{path}: tensor")), (
            f"{kind}: names no file: {refusal}"
        )
        outcome.refused[kind] += 1
        return
    if kind == FORGED:
        outcome.accepted += 1
        return
    assert found == expected, f"{kind}: {path} was read as something else"
    outcome.sound[kind] += 1


@contextmanager
def _written(path: Path, files: dict[str, Octets], sound: dict[str, bytes]) -> Iterator[None]:
    changed = [name for name in files if files[name] != sound[name]]
    for name in changed:
        (path / name).write_bytes(files[name])
    try:
        yield
    finally:
        for name in changed:
            (path / name).write_bytes(sound[name])


def main() -> None:
    """Print how many copies were refused and how many were sound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="copies that are verified, and as many that are loaded")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = make_checkpoints(Path(directory))
        for what, read in (("verified", contents), ("loaded as models", loaded)):
            outcome = fuzz(checkpoints, read, options.cases, options.seed)
            print(
                f"{outcome.cases} damaged copies {what}: {outcome.refused.total()} refused by name, "
                f"{outcome.sound.total()} whole all the same, {outcome.accepted} forged to what their tensors fit; "
                f"slowest {outcome.slowest:.2f} s, memory + {outcome.memory / 1e6:.0f} MB"
            )
            print("  refused:", dict(outcome.refused), " whole:", dict(outcome.sound))


if __name__ == "__main__":
    main()
