import dataclasses

import pytest

from arbllm.card import CardFacts, model_card
from arbllm.config import BinarizationConfig

FACTS = CardFacts(
    name="smollm2-packed",
    source="HuggingFaceTB/SmolLM2-135M",
    version="9.8.7",
    config=BinarizationConfig(method="arb-x", groups=4, split_on="saliency"),
    calibration={"text": "c4", "windows": 128, "window_length": 2048, "seed": 7},
    true_bits=2.9342,
    nominal_bits=1.0617,
    bytes_on_disk=95_123_456,
    output_error=0.03456,
)


def test_tells_method_bits_and_calibration():
    card = model_card(FACTS)
    for expected in ("arb-x", "4 groups", "saliency", "2.934", "1.062", "95,123,456", "0.0346", "9.8.7"):
        assert expected in card
    assert "128 windows of 2048 tokens of c4, seed 7" in card
    assert "perplexity" not in card


def test_the_lines_that_load_it_import_arbllm_first():
    card = model_card(FACTS)
    code = card.split("```python\n")[1].split("```")[0]
    assert code.index("import arbllm") < code.index('arbllm.load("smollm2-packed")')


def test_front_matter_names_a_model_of_the_hub():
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M"\n' in model_card(FACTS).split("---")[1]


@pytest.mark.parametrize("text", ["wikitext2", "builtin"])
def test_measured_perplexity(text):
    card = model_card(dataclasses.replace(FACTS, perplexity={text: (31.4159, 2048)}))
    assert "31.42 at a context of 2048" in card


def test_local_paths_stay_private(tmp_path):
    model, text = tmp_path / "secret" / "model.gguf", tmp_path / "secret" / "wiki.valid.raw"
    model.parent.mkdir()
    model.touch()
    text.touch()
    facts = dataclasses.replace(FACTS, source=str(model), calibration={**FACTS.calibration, "text": str(text)})
    card = model_card(facts)
    assert "secret" not in card
    assert "base_model" not in card
    assert "model.gguf" in card
    assert "wiki.valid.raw" in card


def test_rounded_embeddings_are_told():
    assert "embeddings and head are\nas they were" in model_card(FACTS)
    assert "embeddings and head\nin 8 bits" in model_card(dataclasses.replace(FACTS, embedding_bits=8))
