"""What every method of a comparison goes through, and whether kept rows went through the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from arbllm.errors import ConfigError
from arbllm.evaluation.methods import Calibration
from arbllm.evaluation.tasks import definition

SETTINGS, ROWS = "settings.json", "rows"
WEIGHTS, SAMPLE = (".safetensors", ".bin", ".json"), 2**20  # files of a model, and how much of each is compared


@dataclass(frozen=True)
class Protocol:
    """What every method of a comparison goes through.

    Attributes:
        model: a hub id, a local directory or a `.gguf` file.
        calibration: see `Calibration`.
        texts: perplexity is measured on each; see `arbllm.evaluation.evaluate.evaluate`, as for the rest.
        context: tokens of a window.
        max_windows: windows of each text at most; None for all.
        tasks: zero-shot tasks.
        task_data: the folder with their raw data sets; None takes them from the hub.
        limit: items of each task at most; None for all.
    """

    model: str
    calibration: Calibration = field(default_factory=Calibration)
    texts: tuple[str, ...] = ("wikitext2",)
    context: int = 2048
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None


def shown_settings(protocol: Protocol) -> dict[str, Any]:
    """The settings of a comparison with files by their names alone, to be shown elsewhere."""
    settings = _plain(protocol)
    settings |= {"model": Path(protocol.model).name, "texts": [Path(text).name for text in protocol.texts]}
    settings["calibration"] |= {"text": Path(protocol.calibration.text).name}
    return {key: value for key, value in settings.items() if key != "task_data"}


def merged_settings(protocol: Protocol, out: Path) -> dict[str, Any]:
    """The settings of a comparison with those that the rows in `out`, if there are any, were made with.

    Texts, tasks and how much of each may differ: what is missing of a row is run. Rows know texts by the names of their
    files, and tasks by theirs, so that neither name may come to stand for other data.

    Raises:
        ConfigError: they do not go together.
    """
    settings = _plain(protocol) | {"contents": contents(protocol)}
    begun = settings
    if (out / SETTINGS).exists() and any((out / ROWS).glob("*.json")):
        try:
            begun = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{out / SETTINGS}: not readable ({error}); choose another --out") from error
    before, free = _fixed(begun), set() if any((out / ROWS).glob("*-distilled.json")) else {"distill_windows"}
    for name, value in _fixed(settings).items():
        if before.get(name) != value and name not in free:
            raise ConfigError(
                f"{out} holds a comparison with other settings ({name} was {before.get(name)}, not {value}); choose "
                "another --out, or the same settings"
            )
    known = begun.get("contents", {})
    if changed := [name for name, found in settings["contents"].items() if known.get(name, found) != found]:
        raise ConfigError(f"{changed[0]} is not what it was when {out} was begun; choose another --out")
    texts = list(dict.fromkeys([*begun["texts"], *settings["texts"]]))
    named = {Path(text).name: text for text in reversed(texts)}
    if twice := [text for text in texts if named[Path(text).name] != text]:
        raise ConfigError(f"texts {named[Path(twice[0]).name]} and {twice[0]} have one name; rename a file")
    asked = begun["tasks"] and settings["tasks"]
    if asked and begun["task_data"] != settings["task_data"]:
        raise ConfigError(
            f"{out} holds answers to tasks of {begun['task_data'] or 'the hub'}, not of "
            f"{settings['task_data'] or 'the hub'}; choose another --out, or the same --task-data"
        )
    tasks = {} if settings["tasks"] else {"tasks": begun["tasks"], "task_data": begun["task_data"]}
    return settings | tasks | {"texts": texts, "contents": known | settings["contents"]}


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a comparison have in common."""
    calibration = {"calibration" if name == "text" else name: value for name, value in settings["calibration"].items()}
    return {"model": settings["model"], "context": settings["context"], **calibration}


def contents(protocol: Protocol) -> dict[str, str]:
    """Checksums of what a protocol reads from the disk, by name: texts, questions, and samples of the model's files."""
    found = {}
    questions = []
    if data := protocol.task_data:
        tasks = (definition(task, Path(data)) for task in protocol.tasks)
        questions = [str(Path(data, file)) for task in tasks for file in task["dataset_kwargs"]["files"]]
    for name in (*protocol.texts, protocol.calibration.text, *questions):
        if (file := Path(name).expanduser()).is_file():
            found[name] = sha256(file.read_bytes()).hexdigest()
    model = Path(protocol.model).expanduser()
    files = [model] if model.is_file() else sorted(path for path in model.glob("*") if path.suffix in WEIGHTS)
    if files:
        found[protocol.model] = sha256(b"".join(map(_sample, files))).hexdigest()
    return found


def _sample(file: Path) -> bytes:
    """The size of a file, and its beginning and end."""
    with file.open("rb") as stream:
        first = stream.read(SAMPLE)
        stream.seek(max(0, file.stat().st_size - SAMPLE))
        return b"".join((str(file.stat().st_size).encode(), first, stream.read()))


def _plain(protocol: Protocol) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(protocol)))
