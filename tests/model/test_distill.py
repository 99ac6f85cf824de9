import copy

import pytest
import torch

from arbllm.config import BinarizationConfig
from arbllm.errors import ModelError
from arbllm.model.distill import distill, distill_model
from arbllm.model.events import DistillationFinished, DistillationStep, Event
from arbllm.model.quantize import quantize_model
from arbllm.model.tune import Tuning
from arbllm.nn import BinaryLinear
from tests.model.tiny_models import random_windows, tiny_model

CPU = torch.device("cpu")


def packed(dtype: torch.dtype = torch.float32):
    """A packed tiny llama and the dense one."""
    model = tiny_model("llama").to(dtype)
    teacher = copy.deepcopy(model)
    quantize_model(model, random_windows(), BinarizationConfig(bits=3.0, iterations=1, allocation="uniform"))
    return model, teacher


def test_divergence_on_held_out_text_never_rises_and_only_scales_change():
    model, teacher = packed()
    before = {name: module.matrix for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    result = distill(model, teacher, random_windows(), Tuning(8, rate=1e-2))
    assert result.after <= result.before
    after = {name: module.matrix for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].signs, matrix.signs) for name, matrix in before.items())


def test_a_half_precision_model_comes_back_as_it_was():
    model, teacher = packed(torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    events: list[Event] = []
    distill_model(model, teacher, random_windows(), Tuning(2), CPU, events.append)
    assert dtypes == {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert [type(event) for event in events] == [DistillationStep] * 2 + [DistillationFinished]


def test_too_little_text_is_refused():
    model, teacher = packed()
    with pytest.raises(ModelError, match="more windows"):
        distill(model, teacher, random_windows()[:2], Tuning(2))
