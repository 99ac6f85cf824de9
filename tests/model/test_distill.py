import copy

import pytest
import torch

from arbllm.config import BinarizationConfig
from arbllm.errors import ModelError
from arbllm.model.distill import choose_lessons, distill, distill_model, distillation_rate, read_lessons
from arbllm.model.events import DistillationFinished, DistillationStep, Event, TeacherRead
from arbllm.model.quantize import quantize_model
from arbllm.model.training import Tuning
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
    tuning = Tuning(8, rate=1e-2)
    lessons = choose_lessons(random_windows(), tuning)
    result = distill(model, read_lessons(teacher, lessons), lessons, tuning)
    assert result.after <= result.before
    after = {name: module.matrix for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].signs, matrix.signs) for name, matrix in before.items())


def test_a_half_precision_model_comes_back_as_it_was():
    model, teacher = packed(torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    events: list[Event] = []
    distill_model(model, lambda: teacher, random_windows(), Tuning(2), CPU, events.append)
    assert dtypes == {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    kinds = [TeacherRead] * 3 + [DistillationStep] * 2 + [DistillationFinished]
    assert [type(event) for event in events] == kinds


def test_what_is_kept_in_single_precision_is_not_rounded():
    """As transformers keeps routers and norms of some models, whatever the dtype of the rest."""
    model, teacher = packed(torch.bfloat16)
    embedding = model.get_input_embeddings()
    embedding.weight.data = torch.randn(embedding.weight.shape)
    before = embedding.weight.data.clone()
    distill_model(model, lambda: teacher, random_windows(), Tuning(2), CPU, lambda _: None)
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_teacher_says_what_the_dense_model_says(kind):
    """Gemma 2 caps its logits behind the head, so that they are computed anew."""
    model = tiny_model(kind).eval()
    lessons = choose_lessons(random_windows(6), Tuning(3))
    teacher = read_lessons(model, lessons)
    for piece in (*lessons.train, *lessons.held_out):
        expected = model(input_ids=lessons.pieces[piece : piece + 1]).logits[0]
        assert torch.equal(teacher(piece), expected)
        assert not teacher(piece).requires_grad


def test_lessons_go_through_all_pieces_before_they_repeat():
    lessons = choose_lessons(random_windows(6), Tuning(100))
    count = len(lessons.pieces) - len(lessons.held_out)
    assert sorted(lessons.train[:count]) == list(range(count))
    assert lessons.train[count : 2 * count] == lessons.train[:count]
    assert not {*lessons.train} & {*lessons.held_out}


def test_too_little_text_is_refused():
    with pytest.raises(ModelError, match="more windows"):
        choose_lessons(random_windows()[:2], Tuning(2))


def test_few_steps_learn_more_slowly():
    assert distillation_rate(8) == distillation_rate(384) / 4
    assert distillation_rate(32) == distillation_rate(384)
