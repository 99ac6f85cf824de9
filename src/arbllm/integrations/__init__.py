"""Bridges to other libraries, and the hook that lets `import arbllm` announce itself to transformers for free.

transformers has no entry point for quantization methods: a method must be registered in the process, with classes that
derive from those of transformers. Importing them takes seconds, which `import arbllm` must not cost. So where
transformers' quantizers are not imported yet, the registration waits for that import, which every
`from_pretrained` makes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the packed format with transformers, at once or right after transformers imports its quantizers."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Finds the one module as Python would, and has the registration follow its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    import_module("arbllm.integrations.transformers")
