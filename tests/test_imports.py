"""The architecture as a test: imports run downhill, and `import arbllm` stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import arbllm

SOURCE = Path(arbllm.__file__).parent

# Each layer may import from its own row and from the rows below it.
LAYERS = (
    ("cli", "__main__"),
    ("evaluation",),
    ("pipeline", "distillation", "job", "plan", "sizes", "export", "card", "progress"),
    ("model", "text"),
    ("integrations",),
    ("nn", "tunable", "embedding", "experts"),
    ("kernels", "rebuild"),
    ("solver", "baselines"),
    ("segments", "budget"),
    ("factor", "difference"),
    ("config",),
    ("format", "binarize"),
    ("errors", "native", "summary", "device", "measure", "hub"),
)
RANK = {name: rank for rank, row in enumerate(reversed(LAYERS)) for name in row}


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of arbllm that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("arbllm."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("arbllm."))
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downhill(path):
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part == "__init__":
        pytest.skip("the package itself names everything, lazily")
    uphill = {name for name in imported_parts(path) if RANK[name] > RANK[part]}
    assert not uphill, f"{part} must not import {uphill}"


def test_the_mathematics_imports_nothing_but_plain_types():
    for path in (SOURCE / "binarize").glob("*.py"):
        assert imported_parts(path) <= {"binarize", "errors", "native"}


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, arbllm; print([m for m in ('torch', 'transformers', 'triton', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in arbllm.__all__:
        assert getattr(arbllm, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        arbllm.nonsense  # noqa: B018
