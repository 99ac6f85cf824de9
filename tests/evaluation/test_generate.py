import pytest

from arbllm.errors import ConfigError
from arbllm.evaluation.generate import generate
from tests.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(eos_token_id=None)


def test_streams_the_greedy_continuation(model):
    tokenizer = byte_tokenizer()
    inputs = tokenizer("Hello", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, 5:]
    pieces: list[str] = []
    text = generate(model, tokenizer, "Hello", max_new_tokens=12, on_text=pieces.append)
    assert text == "".join(pieces) == tokenizer.decode(output, skip_special_tokens=True)


def test_a_penalty_keeps_tokens_from_coming_again(model):
    tokenizer = byte_tokenizer()
    inputs = tokenizer("Hello", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 50, "pad_token_id": 0}
    output = model.generate(**inputs, repetition_penalty=1e6, **options)[0, 5:]
    assert len(output.unique()) == len(output) > len(model.generate(**inputs, **options)[0, 5:].unique())
    text = generate(model, tokenizer, "Hello", max_new_tokens=50, repetition_penalty=1e6)
    assert text == tokenizer.decode(output, skip_special_tokens=True)


def test_drawing_depends_on_the_seed_alone(model):
    first, again, other = (
        generate(model, byte_tokenizer(), "Hello", max_new_tokens=12, temperature=5.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("Hello", {"max_new_tokens": 0}, "at least 1"),
        ("Hello", {"max_new_tokens": 124}, "5 tokens of the prompt and 124 new ones; the model takes 128: ask for 123"),
        ("Hello" * 26, {}, "the model takes 128: shorten the prompt"),
        ("Hello", {"temperature": -1.0}, "0 or more"),
        ("Hello", {"repetition_penalty": 0.0}, "above 0"),
        ("Hello", {"repetition_penalty": float("nan")}, "above 0"),
        ("Hello", {"seed": 2**64}, "seed must be a number of 64 bits"),
        ("caf\udce9", {}, "no valid text"),  # as Python has arguments that are not UTF-8
    ],
)
def test_unusable_arguments(model, prompt, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, byte_tokenizer(), prompt, **options)
