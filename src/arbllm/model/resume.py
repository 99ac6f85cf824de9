"""Work that survives a kill: what is finished of a job is kept on the disk, and the same command goes on from there.

Beside the output directory OUT lies `.OUT.unfinished` while a job runs:

    manifest.json              what the job is: model, options, calibration tokens, versions
    cost.json                  seconds and peak memory up to now
    shares.safetensors         how the bits are divided among the linears, where that was measured
    block-00000.safetensors    a finished block: packed linears, its other parameters, events
    training.safetensors       the distillation as it was a while ago: scales, norms, Adam's moments, losses
    distilled.safetensors      the whole model's packed linears and norms after distillation
    checkpoint/                the output directory to be
    lock                       held by the job that is running

A file appears whole or not at all: it is written under another name, brought to the disk, and renamed. Each holds the
checksums of its tensors and that of the manifest.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from arbllm.errors import ArbllmError, CheckpointError
from arbllm.format import output
from arbllm.format.checksum import canonical_checksum, checksum
from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.output import check_replaceable, output_directory, put_back
from arbllm.measure import Measurement, Meter
from arbllm.model.events import Event, read_event
from arbllm.model.training import Training
from arbllm.nn import BinaryLinear

MANIFEST_FILE, COST_FILE, LOCK_FILE, CHECKPOINT_DIRECTORY = "manifest.json", "cost.json", "lock", "checkpoint"
SHARES, TRAINING, DISTILLED = "shares", "training", "distilled"
WORTH_KEEPING = ("block-*", TRAINING)  # where a job was stopped before its end
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class FinishedBlock:
    """All that a decoder block became.

    Attributes:
        matrices: its packed linears by their names in the model.
        others: its other parameters by their names in the block, in the dtypes that it computes in.
        events: what was emitted meanwhile, up to `BlockFinished`.
    """

    matrices: Mapping[str, BinaryMatrix]
    others: Mapping[str, Tensor]
    events: tuple[Event, ...]


class Progress:
    """What is finished of a job, on the disk.

    Attributes:
        directory: where.
        manifest: what the job is, plain values.
    """

    def __init__(
        self, directory: Path, manifest: Mapping[str, Any], overwrite: bool = False, meter: Meter | None = None
    ) -> None:
        """Begin in an empty directory, or go on with the same job.

        Args:
            directory: see the class.
            manifest: see the class.
            overwrite: drop what another job left.
            meter: what measures the job; None begins here.

        Raises:
            ArbllmError: the directory is of another job; shows what differs.
        """
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads(json.dumps(manifest))
        self._meter = meter or Meter()
        self._begin(overwrite)
        self._before = self._read_cost()

    def _begin(self, overwrite: bool) -> None:
        directory = self.directory
        file = directory / MANIFEST_FILE
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            output.write_whole(file, json.dumps(self.manifest, indent=2).encode())
            return
        except ValueError as error:
            if not overwrite:
                raise ArbllmError(f"{file}: not readable ({error}); pass --overwrite to start again") from error
            before = {}
        if before == self.manifest:
            return
        if not overwrite:
            raise ArbllmError(
                f"{directory} holds the unfinished work of another job ({_difference(before, self.manifest)}); go on "
                "with that one by its own options, or pass --overwrite to start again"
            )
        for part in (*directory.glob("*.safetensors"), directory / COST_FILE):
            part.unlink(missing_ok=True)
        output.write_whole(file, json.dumps(self.manifest, indent=2).encode())

    def cost(self) -> Measurement:
        """What the job has cost so far, before it was stopped and since."""
        return self._before + self._meter.read()

    def _read_cost(self) -> Measurement:
        try:
            return Measurement(**json.loads((self.directory / COST_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Measurement()  # nothing was finished yet

    def block(self, index: int) -> FinishedBlock | None:
        """A finished block, on the CPU; None where it is not finished."""
        found = self._read(_block_name(index))
        if found is None:
            return None
        tensors, values = found
        layouts = {name: Layout.from_dict(layout, name) for name, layout in values["layouts"].items()}
        return FinishedBlock(
            {
                name: BinaryMatrix.from_tensors(layout, {key: tensors[f"{name}.{key}"] for key in layout.tensors()})
                for name, layout in layouts.items()
            },
            {name: tensors[f"other.{name}"] for name in values["others"]},
            tuple(map(read_event, values["events"])),
        )

    def keep_block(self, index: int, block: FinishedBlock) -> None:
        """Keep a finished block."""
        tensors = {
            f"{name}.{key}": tensor
            for name, matrix in block.matrices.items()
            for key, tensor in matrix.tensors().items()
        }
        values = {
            "layouts": {name: matrix.layout.to_dict() for name, matrix in block.matrices.items()},
            "others": list(block.others),
            "events": [event.to_dict() for event in block.events],
        }
        tensors |= {f"other.{name}": tensor for name, tensor in block.others.items()}
        self._write(_block_name(index), tensors, values)

    def shares(self) -> dict[str, float] | None:
        """Bits a weight of each linear by its name; None where they are not known yet."""
        found = self._read(SHARES)
        return found[1] if found else None

    def keep_shares(self, shares: Mapping[str, float]) -> None:
        """Keep how the bits are divided."""
        self._write(SHARES, {}, dict(shares))

    def restore_distilled(self, model: nn.Module) -> Event | None:
        """Put the distilled scales and norms into a packed model; the event that told of it, or None for no such."""
        found = self._read(DISTILLED)
        if found is None:
            return None
        tensors, values = found
        for name, tensor in distilled_tensors(model).items():
            tensor.copy_(tensors[name])
        return read_event(values["event"])

    def keep_distilled(self, model: nn.Module, event: Event) -> None:
        """Keep what distillation made of a packed model, in the place of what it was on the way."""
        self._write(DISTILLED, distilled_tensors(model), {"event": event.to_dict()})
        (self.directory / f"{TRAINING}.safetensors").unlink(missing_ok=True)

    def training(self) -> Training | None:
        """The distillation as it was kept last, on the CPU; None where it was not."""
        found = self._read(TRAINING)
        return Training(*found) if found else None

    def keep_training(self, training: Training) -> None:
        """Keep a distillation in its middle."""
        self._write(TRAINING, training.tensors, training.values)

    def _write(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        sums = {key: checksum(tensor) for key, tensor in plain.items()}
        metadata = {
            "manifest": canonical_checksum(self.manifest),
            "values": json.dumps(values),
            "checksums": json.dumps(sums),
            "checksum": canonical_checksum([values, sums]),
        }
        output.write_whole(self.directory / f"{name}.safetensors", safetensors.torch.save(plain, metadata))
        output.write_whole(self.directory / COST_FILE, json.dumps(self.cost().to_dict()).encode())

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and values of a file; None where there is none, or it is damaged, which is warned of."""
        file = self.directory / f"{name}.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as reader:
                metadata = reader.metadata()
                tensors = {key: reader.get_tensor(key).clone() for key in reader.keys()}  # noqa: SIM118
            values, sums = json.loads(metadata["values"]), json.loads(metadata["checksums"])
            if metadata["manifest"] != canonical_checksum(self.manifest):
                raise ValueError("it is of another job")
            if metadata["checksum"] != canonical_checksum([values, sums]):
                raise ValueError("its values do not match their checksum")
            if sums != {key: checksum(tensor) for key, tensor in tensors.items()}:
                raise ValueError("a tensor does not match its checksum")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            warnings.warn(f"{file} is damaged ({error}); that part is done again", stacklevel=1)
            return None
        return tensors, values


@contextmanager
def resumable_output(out: Path | str, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """As `output_directory`, with a directory for what is finished, which outlives the job if that does not end well.

    Args:
        out: the directory to be.
        overwrite: replace an existing `out`.

    Yields:
        Where finished work is kept (see `Progress`), and the directory to write in, which becomes `out`.

    Raises:
        ArbllmError: as `output_directory`; or another job is writing to `out`.
    """
    out = Path(out).resolve()
    check_replaceable(out, overwrite)
    directory = unfinished_directory(out)
    with _locked(directory / LOCK_FILE, out):
        put_back(out, directory / CHECKPOINT_DIRECTORY)
        check_replaceable(out, overwrite)
        _clear(directory)
        try:
            with output_directory(out, overwrite, directory / CHECKPOINT_DIRECTORY) as work:
                yield directory, work
        except BaseException:
            if any(file for name in WORTH_KEEPING for file in directory.glob(f"{name}.safetensors")):
                warnings.warn(f"what is finished is kept: the same command goes on with {out}", stacklevel=1)
            else:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        shutil.rmtree(directory, ignore_errors=True)


def unfinished_directory(out: Path) -> Path:
    """Where the finished work of a job for `out` is kept."""
    out = out.resolve()
    return out.with_name(f".{out.name}.unfinished")


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Checksum of tensors, names, dtypes and shapes included."""
    return canonical_checksum(
        {name: [str(tensor.dtype), list(tensor.shape), checksum(tensor)] for name, tensor in named}
    )


def distilled_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What distillation may have changed: all of the packed linears, and the parameters that are vectors."""
    packed = {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if isinstance(module, BinaryLinear)
        for key, buffer in module.named_buffers(recurse=False)
    }
    vectors = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.ndim == 1}
    return packed | vectors


def _block_name(index: int) -> str:
    return f"block-{index:05}"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which values differ, the first few."""
    old, new = _flat(before), _flat(now)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    shown = ", ".join(f"{name} {old.get(name)!r} then, {new.get(name)!r} now" for name in names[:_SHOWN_DIFFERENCES])
    return shown + (f" and {len(names) - _SHOWN_DIFFERENCES} more" if len(names) > _SHOWN_DIFFERENCES else "")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of nested mappings by their last names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _clear(directory: Path) -> None:
    """Remove what a killed job had not finished."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix == ".part":
            path.unlink()


def _locked(file: Path, out: Path) -> IO[str]:
    """The file, open and locked. A job that ended in between has removed it: then it is made anew.

    Raises:
        ArbllmError: another process holds the lock, or the file cannot be made.
    """
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                lock = file.open("w")
                _lock(lock, out)
                if file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                    return lock
                lock.close()
        except OSError as error:
            raise ArbllmError(f"{out}: cannot be made ({error.strerror}); choose another output directory") from error


def _lock(file: IO[str], out: Path) -> None:
    """Hold the lock until the file is closed, or the process ends in whatever way; closed it is where that fails.

    Raises:
        ArbllmError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ArbllmError(f"{out}: another job is writing to it; wait for it, or choose another directory") from error
    except OSError as error:
        file.close()
        raise ArbllmError(f"{out}: its file system has no locks ({error.strerror}); choose another one") from error
