"""The model card (`README.md`) that every packed checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arbllm.config import BinarizationConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
{base_model}tags:
- arbllm
- binarized
- {method}
---

# {name}

{source}, binarized with arbllm {version}.
Linear layers are stored at **{true_bits:.2f} bits a weight**, everything included; {embeddings}

```python
import arbllm  # teaches transformers to read this checkpoint; without it the weights would be random

model = arbllm.load("{path}")
```

After `import arbllm`, `{auto}.from_pretrained` works too.
On the command line: `arbllm generate {path} "Once upon a time"`.

| | |
| --- | --- |
{rows}

True bits count everything that is stored for a linear layer: signs, group and column bitmaps, second signs and scales.
Nominal bits count signs alone, as papers do.
"""

_EMBEDDINGS = {16: "embeddings and head are\nas they were", 8: "embeddings and head\nin 8 bits with one scale a row"}
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
}
_NORMS = {True: "norms were tuned with the scales.", False: "norms are as they were."}


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        name: the checkpoint's name.
        source: the model that was quantized, as the user named it.
        version: the version of arbllm.
        config: method and options.
        calibration: `text`, `windows`, `window_length`, `seed`, and the steps `tune` and `distill`; `distillation` has
            the first four of the last distillation, where that was on another text.
        true_bits: stored bits a weight of the linears.
        nominal_bits: signs a weight of the linears.
        bytes_on_disk: bytes of the tensors' files.
        output_error: mean relative output error of the linears.
        perplexity: text name -> (perplexity, context), where measured.
        embedding_bits: 8 where embeddings and head were rounded to 8 bits, 16 where they are as they were.
        auto: name of transformers' class that opens the model, see `arbllm.integrations.auto`.
    """

    name: str
    source: str
    version: str
    config: BinarizationConfig
    calibration: Mapping[str, Any]
    true_bits: float
    nominal_bits: float
    bytes_on_disk: int
    output_error: float
    perplexity: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    embedding_bits: int = 16
    auto: str = "AutoModelForCausalLM"


def _is_tuned(calibration: Mapping[str, Any]) -> bool:
    return bool(calibration.get("tune") or calibration.get("distill"))


def model_card(facts: CardFacts) -> str:
    """The text of `README.md`: front matter for model hubs, the lines that load the model, and a table of facts."""
    config, calibration = facts.config, facts.calibration
    rows = {
        "method": described(config.to_dict()),
        "tuning": f"{calibration.get('tune', 0)} steps a block, {calibration.get('distill', 0)} of distillation"
        + _on_another_text(calibration),
        "true bits a weight (linears)": f"{facts.true_bits:.3f}",
        "nominal bits a weight (linears)": f"{facts.nominal_bits:.3f}",
        "bytes on disk": f"{facts.bytes_on_disk:,}",
        "mean relative output error of a linear": f"{facts.output_error:.4f}",
        "calibration": _windows(calibration),
    }
    for text, (perplexity, context) in facts.perplexity.items():
        rows[f"perplexity, {_named(text)}"] = f"{perplexity:.2f} at a context of {context}"
    return _CARD.format(
        base_model=f"base_model: {json.dumps(facts.source)}\n" if _is_hub_id(facts.source) else "",
        task=_TASKS[facts.auto],
        auto=facts.auto,
        method=config.method,
        name=facts.name,
        source=f"`{_named(facts.source)}`",
        version=facts.version,
        path=facts.name,
        true_bits=facts.true_bits,
        embeddings=f"{_EMBEDDINGS[facts.embedding_bits]}; {_NORMS[_is_tuned(calibration)]}",
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )


def described(options: Mapping[str, Any]) -> str:
    """Method and options in a few words.

    Args:
        options: as `BinarizationConfig.to_dict` gives them.
    """
    if options.get("bits") is not None:
        return f"{options['method']}, {options['bits']:.4g} bits a weight, {options.get('allocation')} allocation"
    return (
        f"{options.get('method')}, partition {options.get('partition')}, {options.get('groups')} groups, blocks of "
        f"{options.get('block_size')} columns, {options.get('iterations')} iterations, thresholds by the "
        f"{options.get('split_on')}, {options.get('compensation')} compensation"
    )


def _windows(text: Mapping[str, Any]) -> str:
    """A calibration text in a few words."""
    length, name = text["window_length"], _named(str(text["text"]))
    return f"{text['windows']} windows of {length} tokens of {name}, seed {text['seed']}"


def _on_another_text(calibration: Mapping[str, Any]) -> str:
    return f" on {_windows(calibration['distillation'])}" if "distillation" in calibration else ""


def _named(path: str) -> str:
    """A hub id as it is, a local path by its last part: where it lay on somebody's disk is nobody's business."""
    if path == "builtin":
        return "the built-in text"
    return path if _is_hub_id(path) else Path(path).name


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and name.count("/") <= 1
