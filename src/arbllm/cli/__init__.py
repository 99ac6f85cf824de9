"""The command line. One file a command; what they share lies in `options` and `output`.

Nothing here imports torch or transformers before a command runs, so that `arbllm --help` answers at once.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the `arbllm` command."""
    import signal

    from arbllm.cli.app import app

    # Ended from outside, as by Ctrl-C: what was half-written is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
