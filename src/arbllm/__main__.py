"""`python -m arbllm`."""

from arbllm.cli import main

main()
