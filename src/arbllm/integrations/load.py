"""Load a packed checkpoint whole, or say why not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from arbllm.device import choose_device, is_lack_of_memory
from arbllm.errors import ArbllmError, CheckpointError
from arbllm.format.checkpoint import QUANT_METHOD, open_checkpoint
from arbllm.hub import hub_is_reachable
from arbllm.integrations.auto import auto_class


def load(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a packed checkpoint, verifying every byte of it.

    >>> model = arbllm.load("smollm2-packed")

    Args:
        path: a directory, or the id of a repository on the hub.
        dtype: of the dense tensors, such as embeddings; None takes the checkpoint's. Packed tensors keep theirs.
        device: where the model goes; None is the CPU.
        trust_remote_code: run model code that comes with the checkpoint.

    Returns:
        An ordinary transformers causal LM, in evaluation mode, with `BinaryLinear` in the place of packed linears (and
        `Int8Embedding`, `Int8Linear` in the place of embeddings and head where they are in 8 bits).

    Raises:
        CheckpointError: not a packed checkpoint, of another format version, damaged, or not loaded whole; names the
            tensor.
        ConfigError: `device` is not there.
        ImportError: `device` needs the library accelerate.
    """
    if (local := Path(path).expanduser()).exists():
        open_checkpoint(path := local)
    if device is not None:
        choose_device(str(device))
    options = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": not (local.exists() or hub_is_reachable()),
    }
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"{path} is not a packed checkpoint: its config.json names no arbllm quantization")
        model, report = auto_class(config).from_pretrained(
            path,
            dtype=dtype or "auto",
            device_map=None if device is None else {"": device},
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: neither a directory here nor one that the hub gives ({reason})") from error
    except (ArbllmError, ImportError):
        raise
    except Exception as error:  # a damaged config.json fails in any way that transformers knows
        if is_lack_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: config.json describes no model that can be loaded ({reason})") from error
    if not local.exists():
        open_checkpoint(Path(cached_file(path, CONFIG_NAME, local_files_only=True)).parent)
    for name in sorted(report["missing_keys"]):
        raise CheckpointError(f"{path}: the model needs tensor {name}, which the checkpoint does not have")
    return model
