"""`arbllm eval MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arbllm.cli.options import Context, Debug, Device, Dtype, Json, MaxWindows, Model, TrustRemoteCode
from arbllm.cli.output import command, format_bytes, print_facts, print_json, say

if TYPE_CHECKING:
    from arbllm.evaluation.evaluate import Evaluation


def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, ptb or c4 (from the hub), a text file, or builtin; several with commas.",
            show_default="wikitext2, or none with --tasks",
        ),
    ] = None,
    context: Context = 2048,
    max_windows: MaxWindows = None,
    skip_windows: Annotated[int, typer.Option(help="Leave out so many windows first: a text in pieces.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks, with commas: arc_easy,arc_challenge,boolq,hellaswag,openbookqa,piqa,..."),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' raw data sets.", show_default="from the hub")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task at most.", show_default="all")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of MODEL, dense or packed, and its accuracy on question answering tasks.

    The usual protocol: the text joined, tokenised once, cut into windows that do not overlap. On a CPU in float32.

    **Examples**

    `arbllm eval smollm2-packed --text wikitext2`

    `arbllm eval smollm2-packed --text wiki.test.raw --max-windows 20`

    `arbllm eval model.gguf --text builtin --context 1024 --json`

    `arbllm eval smollm2-packed --text wikitext2,ptb,c4 --tasks arc_easy,piqa --limit 200`
    """
    with command(debug):
        from arbllm.evaluation.evaluate import evaluate as run
        from arbllm.progress import RequestDisplay, WindowDisplay

        texts = names(text) if text or tasks else ["wikitext2"]
        say("opening", model)
        with WindowDisplay() as windows_display, RequestDisplay() as request_display:
            result = run(
                model,
                texts,
                context=context,
                max_windows=max_windows,
                skip_windows=skip_windows,
                tasks=names(tasks),
                task_data=task_data,
                limit=limit,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                on_window=windows_display,
                on_request=request_display,
            )
        if json:
            print_json(result.to_dict())
            return
        print_facts(_facts(result))


def names(text: str | None) -> list[str]:
    """The names in a list with commas, each once; none in None."""
    return list(dict.fromkeys(name for name in map(str.strip, (text or "").split(",")) if name))


def _facts(result: Evaluation) -> dict[str, str]:
    facts = {}
    files = [Path(text).name for text in result.texts]
    for text, score in result.texts.items():
        name = Path(text).name if files.count(Path(text).name) == 1 else text
        of = "" if len(result.texts) == 1 else f", {name}"
        facts[f"perplexity{of}"] = f"{score.perplexity:.3f}"
        facts[f"windows{of}"] = f"{score.windows} of {score.context} tokens"
    for task in result.tasks:
        accuracy = _with_error(task.acc, task.acc_stderr)
        if task.acc_norm is not None:
            accuracy += f", normalized {_with_error(task.acc_norm, task.acc_norm_stderr)}"
        facts[task.task] = f"{accuracy} ({task.items} items)"
    if result.tasks:
        values = result.to_dict()
        facts["average"] = f"{values['average_acc']:.3f}, normalized {values['average_acc_norm']:.3f}"
    facts |= {
        "size on disk": format_bytes(result.bytes_on_disk) if result.bytes_on_disk else "unknown",
        "time": f"{result.seconds:.0f} s",
        "peak memory": format_bytes(result.peak_memory_bytes),
    }
    if result.true_bits_per_weight is not None:
        facts["true bits a weight"] = f"{result.true_bits_per_weight:.3f}"
        facts["nominal bits a weight"] = f"{result.nominal_bits_per_weight:.3f}"
    return facts


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
