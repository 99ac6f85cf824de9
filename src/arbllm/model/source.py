"""Open a model and its tokenizer: from the hub, a local directory (dense or packed), or a GGUF file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_relative_imports

from arbllm.device import is_lack_of_memory
from arbllm.errors import ArbllmError, CheckpointError, ConfigError, ModelError
from arbllm.format.checkpoint import QUANT_METHOD
from arbllm.format.header import read_header
from arbllm.hub import hub_is_reachable
from arbllm.integrations.auto import auto_class
from arbllm.integrations.load import load

PREPARATION_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def open_model(
    name_or_path: str, dtype: str = "auto", device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    >>> model, tokenizer = open_model("HuggingFaceTB/SmolLM2-135M-Instruct")

    Args:
        name_or_path: a hub id, a local directory (a dense checkpoint or one that arbllm wrote), or a `.gguf` file.
        dtype: `float32`, `float16`, `bfloat16`; `auto` for the dtype that is stored, float16 for GGUF.
        device: where to put the model.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ConfigError: the dtype is unknown.
        ModelError: there is no such model, it is not a causal language model, it is damaged, or it has no tokenizer.
        CheckpointError: a checkpoint that arbllm wrote is damaged.
    """
    # The tokenizer first: it is quick to find out that there is none.
    tokenizer = open_tokenizer(name_or_path, trust_remote_code)
    return open_model_only(name_or_path, dtype, device, trust_remote_code), tokenizer


def open_model_only(
    name_or_path: str, dtype: str = "auto", device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of `open_model`, without a tokenizer."""
    check_dtype(dtype)
    path = Path(name_or_path).expanduser()
    if _is_packed(path):
        return load(path, dtype=DTYPES.get(dtype), device=device, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        options |= {"dtype": DTYPES.get(dtype, torch.float16), **_gguf_options()}
    auto = AutoModelForCausalLM if path.suffix == ".gguf" else auto_class(open_config(name_or_path, trust_remote_code))
    model, report = _from_pretrained(auto, "model", name_or_path, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise ModelError(
            f"{name_or_path}: {sorted(report['missing_keys'])[0]} is not in the checkpoint; it is incomplete, or not a "
            "causal language model"
        )
    if path.suffix == ".gguf" and getattr(model, "hf_quantizer", None) is not None:
        # The weights are dense by now, but with this left in place the model would refuse to be saved.
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(device).eval()


def open_config(name_or_path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of `open_model`'s model.

    Raises:
        ModelError: there is no such model.
    """
    config: PretrainedConfig = _from_pretrained(
        AutoConfig, "configuration", name_or_path, trust_remote_code=trust_remote_code
    )
    return config


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that models are not opened in.

    Raises:
        ConfigError: it is none of `DTYPES`, nor `auto`.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")


def open_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `open_model`.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", name_or_path, trust_remote_code=trust_remote_code)
    if not tokenizer("a")["input_ids"]:  # without files, transformers makes an empty tokenizer of the model's kind
        raise ModelError(f"{name_or_path}: has no tokenizer; put the model's tokenizer files beside its weights")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path, directory: Path) -> None:
    """Write the tokenizer, and what else prepares a model's input, such as the sizes of its images, as it stands there.

    Args:
        tokenizer: the model's.
        name_or_path: see `open_model`; from a GGUF file there is nothing else.
        directory: where to write.
    """
    location = _locate(str(name_or_path))
    # In a file of its own, the tokenizer's template of chats would be the processor's as well, or contradict it.
    own_file = _beside_weights(location, "chat_template.jinja") is not None
    tokenizer.save_pretrained(directory, save_jinja_files=own_file)
    for name in PREPARATION_FILES:
        file = _beside_weights(location, name)
        if file is not None and not (directory / name).exists():
            shutil.copyfile(file, directory / name)
            _copy_code(location, _own_modules(file), directory)


def _own_modules(file: Path) -> list[str]:
    """Modules beside a model's weights whose classes a file of PREPARATION_FILES names."""
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["auto_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    named = [name for found in classes for name in (found if isinstance(found, list) else [found])]
    return [name.partition(".")[0] for name in named if isinstance(name, str)]


def _copy_code(location: Mapping[str, Any], modules: list[str], directory: Path) -> None:
    """Copy a model's own code, and what that imports from beside it."""
    modules = list(modules)
    while modules:
        module = modules.pop()
        if not module.isidentifier():  # a path, or the name of another repository
            continue
        name = f"{module}.py"
        code = _beside_weights(location, name)
        if code is not None and not (directory / name).exists():
            shutil.copyfile(code, directory / name)
            modules += get_relative_imports(code)


def _beside_weights(location: Mapping[str, Any], name: str) -> Path | None:
    """A file of a model's directory, or of its repository on the hub; None where there is none, as with GGUF.

    Warns where the hub, which could be reached a moment ago, does not give it: work of hours is not to fail for that.

    Args:
        location: as `_locate` gives it.
        name: of the file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    model = location["pretrained_model_name_or_path"]
    if Path(model).is_dir():
        file = Path(model) / name
        return file if file.is_file() and "gguf_file" not in location else None
    offline = location["local_files_only"]
    try:
        return Path(hf_hub_download(model, name, local_files_only=offline))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not absent and not offline:
            message = f"{name} of {model} could not be fetched ({_first_line(error)}); if the model has it, copy it"
            warnings.warn(message, stacklevel=2)
        return None


def _from_pretrained(auto: Any, part: str, name_or_path: str, **options: Any) -> Any:
    """`auto.from_pretrained`, with its many ways to fail told in one line.

    Args:
        auto: one of transformers' auto classes.
        part: what it opens, for the message.
        name_or_path: see `open_model`.
        options: of `from_pretrained`.

    Raises:
        ModelError: names the model and what is wrong with it.
        MemoryError, RuntimeError: there is too little memory (see `naming_lack_of_memory`).
    """
    location = _locate(name_or_path)
    try:
        return auto.from_pretrained(**location, **options)
    except ArbllmError:
        raise
    except Exception as error:  # configuration, weights, tokenizer and remote code fail in any way that they know
        if is_lack_of_memory(error):
            raise
        if "Unrecognized configuration class" in str(error):
            raise ModelError(f"{name_or_path}: not a causal language model that transformers knows") from error
        if location["local_files_only"] and not Path(name_or_path).expanduser().exists():
            raise ModelError(
                f"{name_or_path}: no such file or directory; as the name of a model on the hub it is not in the local "
                "cache, and the hub cannot be reached. Give the path of a local model"
            ) from error
        _check_files(Path(name_or_path).expanduser())
        if "custom code" in str(error) and "trust_remote_code" in str(error):
            raise ModelError(
                f"{name_or_path}: comes with code of its own; read it, and pass --trust-remote-code if you trust it"
            ) from error
        raise ModelError(f"{name_or_path}: its {part} cannot be opened ({_first_line(error)})") from error


def _check_files(directory: Path) -> None:
    """Look for the damage that has kept a model from being opened.

    Raises:
        ModelError: a safetensors file is unreadable or damaged; names it.
    """
    for file in sorted(directory.glob("*.safetensors")):
        try:
            read_header(file)
        except CheckpointError as error:
            raise ModelError(str(error)) from error


def _locate(name_or_path: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where the model lies.

    Raises:
        ModelError: a path that leads nowhere, to a directory without a model or with a damaged config.json, or to a
            file of another kind.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name_or_path}: has no config.json, so it is not the directory of a model{_gguf_hint(path)}"
            )
        try:
            json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # transformers would name the part that it happened to open first
            raise ModelError(f"{name_or_path}: its config.json cannot be read ({_first_line(error)})") from error
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name_or_path}: not a .gguf file; give the model's directory, a .gguf file or a hub id")
        return {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "local_files_only": True,
        }
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise ModelError(
            f"{name_or_path}: no such file or directory, and not the name of a model on the hub"
        ) from error
    if path.suffix == ".gguf":
        raise ModelError(f"{name_or_path}: no such file")
    return {"pretrained_model_name_or_path": name_or_path, "local_files_only": not hub_is_reachable()}


def _gguf_hint(directory: Path) -> str:
    files = sorted(directory.glob("*.gguf"))
    return f"; give its file instead: {files[0]}" if files else ""


def _gguf_options() -> dict[str, Any]:
    """Ask for dense weights, where transformers is new enough to keep GGUF blocks packed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _is_packed(path: Path) -> bool:
    """Whether `path` is a checkpoint that arbllm wrote."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
