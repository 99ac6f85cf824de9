"""Methods that binarization is compared with, by name: `rtn-4`, `gptq-3`, `hqq-2` and whatever is registered here.

`gptq-act-order-3` is GPTQ with the columns by falling energy, which its users call act-order.

Each rounds one linear after the other in the same loop over decoder blocks, on the same Hessians, and leaves an
ordinary dense checkpoint; what its codes, scales and zeros would take packed is counted, not stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from torch import Tensor
from transformers import PreTrainedModel

from arbllm.baselines import BITS, Rounded, gptq, round_to_nearest
from arbllm.device import check_disk_space, choose_device
from arbllm.errors import ConfigError
from arbllm.experts import fuse_experts
from arbllm.factor import Factor
from arbllm.format.output import output_directory, output_path
from arbllm.integrations.hqq import BITS as HQQ_BITS
from arbllm.integrations.hqq import hqq_round
from arbllm.measure import measure
from arbllm.model.events import OnEvent
from arbllm.model.rounding import RoundLinear, round_model
from arbllm.model.source import open_model_only, open_tokenizer, save_tokenizer
from arbllm.sizes import dense_sizes
from arbllm.summary import JobSummary
from arbllm.text import calibration_windows

SUMMARY_FILE = "peer.json"
GROUP_SIZE = 128


@dataclass(frozen=True)
class Adapter:
    """A family of methods that differ in their bits.

    Attributes:
        bits: bits of a code that it knows.
        build: from bits, the function that rounds one linear.
        library: that it needs, by the name that Python knows it by, which is also its package's.
    """

    bits: tuple[int, ...]
    build: Callable[[int], RoundLinear]
    library: str | None = None


@dataclass(frozen=True, kw_only=True)
class PeerSummary(JobSummary):
    """What a peer made of a model. The checkpoint is dense; sizes are those that packed weights would have.

    Attributes:
        method: the peer, by name.
        embedding_bytes: of `bytes_on_disk`, embeddings, head and whatever other matrices there are.
        output_errors: of each linear, by name.
    """

    method: str
    embedding_bytes: int
    output_errors: dict[str, float]


def find_peer(name: str) -> tuple[RoundLinear, int]:
    """The function that rounds one linear, and the bits of its codes, of a peer such as `gptq-3`.

    Raises:
        ConfigError: there is none of this name; lists those there are.
    """
    family, _, bits = name.rpartition("-")
    adapter = ADAPTERS.get(family)
    if adapter is None or bits not in map(str, adapter.bits):
        raise ConfigError(f"method {name!r} is unknown; choose one of {', '.join(peer_names())}")
    return adapter.build(int(bits)), int(bits)


def check_library(name: str) -> None:
    """See that a peer can run.

    Raises:
        ConfigError: its library is not installed.
    """
    library = ADAPTERS[name.rpartition("-")[0]].library
    if library and find_spec(library) is None:
        raise ConfigError(f"method {name} needs the library {library}: pip install {library}")


def peer_names() -> list[str]:
    """All peers by name."""
    return [f"{family}-{bits}" for family, adapter in ADAPTERS.items() for bits in adapter.bits]


def quantize_peer(
    model: str | Path,
    out: str | Path,
    method: str,
    *,
    calibration: str = "c4",
    windows: int = 128,
    window_length: int = 2048,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> PeerSummary:
    """Round a model and write it as an ordinary dense checkpoint, with `peer.json`, its summary.

    Args:
        model: a hub id, a local directory or a `.gguf` file.
        out: the directory to write.
        method: a name of `peer_names`.
        calibration: see `arbllm.quantize`, as for the arguments below.
        windows: calibration windows.
        window_length: tokens of a window.
        seed: of the choice of windows.
        device: where to compute, one decoder block at a time; None for the GPU where there is one.
        dtype: to open the model in; `auto` as it is stored.
        trust_remote_code: run model code that comes with the checkpoint.
        overwrite: replace an existing `out`.
        on_event: told of every step as it happens.

    Raises:
        ArbllmError: the model, the text, the method or the disk do not allow it.
    """
    round_linear, bits = find_peer(method)
    check_library(method)
    out = output_path(out, model)
    with output_directory(out, overwrite) as work:
        with measure() as measured:
            tokenizer = open_tokenizer(str(model), trust_remote_code)
            tokens = calibration_windows(calibration, tokenizer, windows, window_length, seed)
            opened = open_model_only(str(model), dtype, trust_remote_code=trust_remote_code)
            dense_bytes, dense_linear_bytes, embedding_bytes = dense_parts(opened)
            check_disk_space(dense_bytes, work)
            results = round_model(
                opened, tokens, round_linear, nominal_bits=bits, device=choose_device(device), on_event=on_event
            )
            fuse_experts(opened)  # as engines know them
            opened.save_pretrained(work)
            save_tokenizer(tokenizer, model, work)
        weights = sum(result.rows * result.columns for result in results)
        linear_bytes = sum(result.bytes for result in results)
        summary = PeerSummary(
            path=out,
            method=method,
            linears=len(results),
            weights=weights,
            true_bits_per_weight=8 * linear_bytes / weights,
            nominal_bits_per_weight=bits,
            output_error=mean(result.output_error for result in results),
            bytes_on_disk=dense_bytes - dense_linear_bytes + linear_bytes,
            linear_bytes=linear_bytes,
            dense_bytes=dense_bytes,
            dense_linear_bytes=dense_linear_bytes,
            embedding_bytes=embedding_bytes,
            output_errors={result.name: result.output_error for result in results},
            **asdict(measured),
        )
        (work / SUMMARY_FILE).write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")
    return summary


def dense_parts(model: PreTrainedModel) -> tuple[int, int, int]:
    """Bytes of all tensors of a dense model (shared ones once), of its blocks' linears, and of other matrices."""
    everything, linears = dense_sizes(model)
    return everything, linears, sum(p.nbytes for p in model.parameters() if p.ndim > 1) - linears


def _nearest(bits: int) -> RoundLinear:
    def run(weight: Tensor, _: Factor) -> Rounded:
        return round_to_nearest(weight, bits, group_size=GROUP_SIZE)

    return run


def _gptq(bits: int) -> RoundLinear:
    def run(weight: Tensor, factor: Factor) -> Rounded:
        return gptq(weight, factor.hessian, bits, group_size=GROUP_SIZE, factor=factor)

    return run


def _gptq_act_order(bits: int) -> RoundLinear:
    def run(weight: Tensor, factor: Factor) -> Rounded:
        return gptq(weight, factor.hessian, bits, group_size=GROUP_SIZE, by_energy=True)

    return run


def _hqq(bits: int) -> RoundLinear:
    def run(weight: Tensor, _: Factor) -> Rounded:
        return hqq_round(weight, bits)

    return run


# A new peer is a function that rounds one matrix, and an entry here.
ADAPTERS = {
    "rtn": Adapter(BITS, _nearest),
    "gptq": Adapter(BITS, _gptq),
    "gptq-act-order": Adapter(BITS, _gptq_act_order),
    "hqq": Adapter(HQQ_BITS, _hqq, "hqq"),
}
