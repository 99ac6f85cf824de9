"""What commands print: results on stdout, everything else on stderr, errors as one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from arbllm.errors import ArbllmError

ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130
PIPE_WIDTH = 200


class PipedConsole(Console):
    """A console that leaves it to `command` that nobody reads on, where rich would end the program with an error."""

    def on_broken_pipe(self) -> None:
        """Raise what was caught."""
        raise


def stdout() -> Console:
    """Where results go; tables keep their full width when they are piped somewhere."""
    console = PipedConsole()
    return console if console.is_terminal else PipedConsole(width=PIPE_WIDTH)


def stderr() -> Console:
    """Where progress and errors go."""
    return PipedConsole(stderr=True)


@contextmanager
def command(debug: bool) -> Iterator[None]:
    """Run the body of a command: other libraries kept quiet, a warning or an error shown as one line, exit code 2.

    Args:
        debug: let errors through, with their traceback, and other libraries talk.
    """
    if debug:
        yield
        return
    _quieten_libraries()
    try:
        with _readable_warnings():
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        stderr().print("interrupted")
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    except BrokenPipeError:  # who reads, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except Exception as error:
        say("[bold red]error:[/]", _one_line(error))
        raise typer.Exit(ERROR_EXIT_CODE) from None


def say(label: str, text: str) -> None:
    """One line on stderr, however long: a label, which may have markup, and a text."""
    stderr().print(label, escape(text), highlight=False, soft_wrap=True)


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout. Values that are infinite or not a number become null, which JSON can hold."""
    from arbllm.evaluation.written import to_json

    typer.echo(to_json(values))


def print_facts(facts: Mapping[str, str]) -> None:
    """A table of two columns on stdout."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    stdout().print(table)


def format_bytes(count: int) -> str:
    """1,234,567 bytes as `1.2 MB`; decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _one_line(error: Exception) -> str:
    """The message of one of our own errors; of any other, its type and a way to learn more."""
    message = " ".join(str(error).split())
    if isinstance(error, ArbllmError):
        return message
    return f"{type(error).__name__}: {message or 'no message'} (--debug shows where)"


@contextmanager
def _readable_warnings() -> Iterator[None]:
    """Show arbllm's own warnings as one line each, and no others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"arbllm\.")
        warnings.showwarning = lambda message, *_: say("[yellow]warning:[/]", str(message))
        yield


def _quieten_libraries() -> None:
    """No log lines of other libraries between ours, and their progress bars on a terminal alone.

    By environment variables, since a command that does not need a library shall not import it to keep it quiet.
    """
    for library in ("TRANSFORMERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not stderr().is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
