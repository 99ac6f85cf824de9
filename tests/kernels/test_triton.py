import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from arbllm.kernels import cuda, triton_configuration

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@needs_triton
def test_kernels_in_the_interpreter():
    """In a process of its own: Triton reads the variable when it is imported, for good."""
    assert " passed" in run("-m", "pytest", "-q", "tests/kernels/triton_cases.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu():
    assert " passed" in run("-m", "pytest", "-q", "tests/kernels/triton_cases.py", TRITON_INTERPRET="0")


@needs_triton
def test_kernels_compile_for_an_h100():
    """The interpreter forgives much: layouts of tensors, assembly and registers are the compiler's business."""
    found = json.loads(run("tests/kernels/compile_triton.py", TRITON_INTERPRET="0"))
    assert set(found) == {
        "triton_rows.multiply_byte_rows",
        "triton_matvec.few_tokens",
        *(f"triton_matmul.{name}" for name in ("scale_inputs", "many_tokens", "dequantize", "gather")),
    }
    assert found["triton_matvec.few_tokens"]["means"] == ["four bytes at a time"]
    assert {"bytes on tensor cores", "loads under way during products"} <= set(
        found["triton_matmul.many_tokens"]["means"]
    )
    assert len(found["triton_matvec.few_tokens"]["variants"]) == 5  # of as many kinds of matrices, not of sizes


def test_without_triton_the_reference_kernel_runs_and_this_is_said_once(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "triton", None)
    cuda._triton.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton is not installed .pip install triton"):
        assert not cuda.available()
    assert not cuda.available()
    assert not recwarn.list
    cuda._triton.cache_clear()


def test_on_old_gpus_the_reference_kernel_runs_and_this_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    cuda._triton.cache_clear()
    with pytest.warns(UserWarning, match=r"needs a GPU of compute capability 8\.0 or more"):
        assert not cuda.available()
    cuda._triton.cache_clear()


@pytest.mark.parametrize("file", sorted(triton_configuration.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_configurations_are_readable(file):
    configuration = triton_configuration.Configuration.from_dict(json.loads(file.read_text()))
    assert file.stem == "default" or triton_configuration.file_of(configuration.device) == file


def test_a_gpu_without_a_file_gets_the_default():
    assert triton_configuration.load("NVIDIA Nonsense 1").device == "any"


def test_shapes_take_precedence_up_to_their_tokens():
    default = triton_configuration.load("any")
    shapes = [
        {"rows": 8, "columns": 16, "tokens": 1, "few": {"rows": 64}},
        {"rows": 8, "columns": 16, "tokens": 4, "few": {"rows": 128}},
        {"rows": 8, "columns": 16, "tokens": 2, "many": {"rows": 256}},
    ]
    configuration = replace(default, shapes=shapes)
    better = [configuration.of(8, 16, tokens) for tokens in (1, 2, 4, 5)]
    assert [each.few.rows for each in better] == [64, 128, 128, default.few.rows]
    assert [each.many.rows for each in better] == [256, 256, *[default.many.rows] * 2]
    assert configuration.of(9, 16, 1) == configuration
