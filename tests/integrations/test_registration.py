import subprocess
import sys

import pytest

CHECK = "print('arbllm' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers.quantizers.auto; import arbllm",
        "import arbllm; import importlib; importlib.reload(arbllm); import transformers.quantizers.auto",
        "import arbllm; from transformers import LlamaForCausalLM; import transformers",
    ],
)
def test_any_order_of_imports_registers(imports):
    assert run(f"{imports}; {CHECK}") == "True"


def test_waiting_costs_no_import():
    watch = "import sys, arbllm; import transformers; print([m for m in ('torch', 'safetensors') if m in sys.modules])"
    assert run(watch) == run(
        "import sys, transformers; print([m for m in ('torch', 'safetensors') if m in sys.modules])"
    )


def test_the_module_found_is_that_of_transformers():
    found = run("import arbllm, transformers.quantizers.auto as a; print(type(a.__loader__).__name__, a.__file__)")
    assert found == run("import transformers.quantizers.auto as a; print(type(a.__loader__).__name__, a.__file__)")
