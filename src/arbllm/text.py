"""Calibration and evaluation text: data sets of the hub, local files, and a built-in text that needs no network.

| name | text | protocol |
| --- | --- | --- |
| `c4` | hub, `allenai/c4`, first shard of `en` | documents, joined by a space for evaluation |
| `wikitext2` | hub, `Salesforce/wikitext`, `wikitext-2-raw-v1` | rows joined by a blank line |
| `ptb` | hub, `ptb-text-only/ptb_text_only` | sentences joined by a space |
| `builtin` | `pydoc_data.topics`, the language reference in every CPython | its last fifth is kept for evaluation |
| a path ending in `.raw` | the file, cut into rows as the hub cuts WikiText | rows joined by a blank line |
| any other path | the file as it is | |

The protocols of the hub's data sets are those of GPTQ, BiLLM and ARB-LLM, so that perplexities can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from arbllm.errors import TextError
from arbllm.hub import hub_is_reachable, is_offline_by_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

NAMES = ("c4", "wikitext2", "ptb", "builtin")
C4_DOCUMENTS = 1100
C4_EVALUATION_TOKENS = 256 * 2048
C4_TRIES_PER_WINDOW = 10_000
BUILTIN_TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class _HubText:
    """Where a data set lies on the hub, and how its rows become one text."""

    repository: str
    column: str
    separator: str
    splits: Mapping[Split, str]
    configuration: str | None = None
    files: Mapping[str, str] | None = None
    revision: str | None = None


_HUB = {
    "c4": _HubText(
        "allenai/c4",
        column="text",
        separator=" ",
        splits={"train": "train", "test": "validation"},
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "wikitext2": _HubText(
        "Salesforce/wikitext",
        column="text",
        separator="\n\n",
        splits={"train": "train", "test": "test"},
        configuration="wikitext-2-raw-v1",
    ),
    # Its main branch is a loading script, which `datasets` no longer runs; the hub keeps a converted copy beside it.
    "ptb": _HubText(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        separator=" ",
        splits={"train": "train", "test": "test"},
        configuration="penn_treebank",
        revision="refs/convert/parquet",
    ),
}


def load_text(name_or_path: str, split: Split = "train") -> str:
    """One text, joined by the protocol of its source (see the table above).

    Args:
        name_or_path: `c4`, `wikitext2`, `ptb`, `builtin`, or the path of a text file in UTF-8.
        split: `train` to calibrate, `test` to evaluate; of a file, both are the whole file. Of `c4`, the first 1100
            documents of the split's first shard.

    Raises:
        TextError: there is no such name or file, it holds no text, or the hub cannot be reached.
    """
    if name_or_path in _HUB:
        rows = _hub_rows(name_or_path, split)
        if name_or_path == "c4":
            rows = rows[:C4_DOCUMENTS]
        text = _HUB[name_or_path].separator.join(rows)
    elif name_or_path == "builtin":
        text = _builtin_text(split)
    else:
        text = _file_text(name_or_path)
    if not text.strip():
        raise TextError(f"{name_or_path}: this text is empty; choose another file or one of {', '.join(NAMES)}")
    return text


def check_amount(windows: int, length: int) -> None:
    """Refuse windows that nothing can be calibrated on.

    Raises:
        TextError: they are too few, or too short.
    """
    if windows < 1 or length < 2:
        raise TextError(f"calibration needs at least one window of two tokens, not {windows} of {length}")


def calibration_windows(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, windows: int = 128, length: int = 2048, seed: int = 0
) -> Tensor:
    """Token windows to calibrate on; the same arguments give the same windows.

    `c4` takes random documents longer than a window, and of each a window at a random offset; `wikitext2` and `ptb`
    take windows at random offsets of the whole text: both as GPTQ and the paper do. The built-in text and files give
    windows at random offsets that do not overlap, so that little text suffices.

    Args:
        name_or_path: see `load_text`.
        tokenizer: the model's tokenizer.
        windows: N.
        length: L, tokens of a window.
        seed: of the offsets.

    Returns:
        int64 (N, L).

    Raises:
        TextError: as `load_text`; or the text is too short, with the number of windows that fit.
    """
    check_amount(windows, length)
    generator = random.Random(seed)
    if name_or_path == "c4":
        return _document_windows(_hub_rows("c4", "train"), tokenizer, windows, length, generator)
    tokens = _tokenize(load_text(name_or_path, "train"), tokenizer)
    slack = tokens.numel() - windows * length
    if name_or_path in _HUB:
        if tokens.numel() <= length:
            raise _too_short(name_or_path, tokens.numel(), windows, length)
        starts = [generator.randint(0, tokens.numel() - length - 1) for _ in range(windows)]
    else:
        if slack < 0:
            raise _too_short(name_or_path, tokens.numel(), windows, length)
        gaps = sorted(generator.randint(0, slack) for _ in range(windows))
        starts = [gap + window * length for window, gap in enumerate(gaps)]
    return torch.stack([tokens[start : start + length] for start in starts])


def evaluation_tokens(name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens to measure perplexity on: the test split, joined and tokenised as one text.

    Args:
        name_or_path: see `load_text`. Of `c4`, at most 256 windows of 2048 tokens.
        tokenizer: the model's tokenizer.

    Returns:
        int64 (T,).

    Raises:
        TextError: as `load_text`.
    """
    tokens = _tokenize(load_text(name_or_path, "test"), tokenizer)
    return tokens[:C4_EVALUATION_TOKENS] if name_or_path == "c4" else tokens


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # Not verbose: that the text is longer than the model's context is the point.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _document_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    length: int,
    generator: random.Random,
) -> Tensor:
    """A window of each of `windows` random documents that are longer than a window."""
    chosen: list[Tensor] = []
    for _ in range(C4_TRIES_PER_WINDOW * windows):
        document = documents[generator.randint(0, len(documents) - 1)]
        if len(document.encode()) < length:  # a token takes at least a byte: no need to tokenise
            continue
        tokens = _tokenize(document, tokenizer)
        if tokens.numel() <= length:
            continue
        start = generator.randint(0, tokens.numel() - length - 1)
        chosen.append(tokens[start : start + length])
        if len(chosen) == windows:
            return torch.stack(chosen)
    raise TextError(
        f"c4: too few documents are longer than {length} tokens ({len(chosen)} found, {windows} asked for); "
        "choose a shorter --window-length"
    )


def _too_short(name: str, tokens: int, windows: int, length: int) -> TextError:
    fit = tokens // length
    remedy = f"choose --windows {fit}, " if fit else ""
    return TextError(
        f"{name}: its {tokens} tokens hold {fit} windows of {length}, not {windows}; "
        f"{remedy}a shorter --window-length, or a longer text"
    )


def _hub_rows(name: str, split: Split) -> Sequence[str]:
    """The rows of a hub data set: loaded on first access, so a big shard is not read whole."""
    source = _HUB[name]
    from huggingface_hub import constants

    remedy = "use the built-in text (--calibration builtin, --text builtin) or the path of a text file instead"
    if not is_offline_by_choice() and not hub_is_reachable():
        raise TextError(
            f"{name}: {constants.ENDPOINT} cannot be reached; {remedy}, or set HF_HUB_OFFLINE=1 to read the local cache"
        )
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.repository,
            source.configuration,
            data_files=source.files and {key: source.files[key] for key in [source.splits[split]]},
            split=source.splits[split],
            revision=source.revision,
            verification_mode="no_checks",  # one shard is not the whole split that the data set declares
        )
    except Exception as error:  # a data set can fail to load in any way that its format, cache and network know
        raise TextError(f"{name}: {source.repository} cannot be loaded ({_first_line(error)}); {remedy}") from error
    return dataset[source.column]


def _builtin_text(split: Split) -> str:
    from pydoc_data.topics import topics

    # Long topics repeat short ones: without the repetitions, no paragraph is in both splits.
    paragraphs = (part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    text = "\n\n".join(dict.fromkeys(part for part in paragraphs if part))
    boundary = text.index("\n\n", int(BUILTIN_TRAIN_SHARE * len(text)))
    return text[boundary + 2 :] if split == "test" else text[:boundary]


def _file_text(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise TextError(f"{name!r} is neither a text file nor one of {', '.join(NAMES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{name}: not a text file in UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise TextError(f"{name}: cannot be read ({error.strerror})") from error
    return "\n\n".join(_wikitext_rows(text)) if path.suffix == ".raw" else text


def _wikitext_rows(text: str) -> list[str]:
    """The rows of the hub's WikiText: each line with its leading space and newline; a blank line is an empty row."""
    lines = text.split("\n")
    rows = [line + "\n" for line in lines[:-1]] + lines[-1:]
    if not rows[-1]:
        rows.pop()
    return [row if row.strip() else "" for row in rows]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
