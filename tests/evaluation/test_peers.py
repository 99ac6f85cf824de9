import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arbllm.baselines import true_bits
from arbllm.errors import ConfigError
from arbllm.evaluation.evaluate import evaluate
from arbllm.evaluation.peers import SUMMARY_FILE, find_peer, peer_names, quantize_peer
from arbllm.model.walk import find_blocks
from tests.tiny import save_tiny, save_tiny_mixture

TEXT = {"calibration": "builtin", "windows": 4, "window_length": 64, "device": "cpu"}
BITS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "dense")


def test_the_summary_counts_codes_scales_and_zeros(dense, tmp_path):
    summary = quantize_peer(dense, tmp_path / "out", "gptq-3", **TEXT)
    model = AutoModelForCausalLM.from_pretrained(dense)
    linears = [linear.weight for block in find_blocks(model) for linear in block.linears]
    bits = sum(true_bits(weight.shape[0], weight.shape[1], 3, 128) * weight.numel() for weight in linears)
    assert summary.linear_bytes == pytest.approx(bits / 8, abs=len(linears))
    assert summary.true_bits_per_weight == pytest.approx(8 * summary.linear_bytes / summary.weights)
    saved = summary.dense_linear_bytes - summary.linear_bytes
    assert summary.bytes_on_disk == sum(tensor.nbytes for tensor in model.parameters()) - saved
    assert summary.output_error == pytest.approx(sum(summary.output_errors.values()) / 14)
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text()) == json.loads(json.dumps(summary.to_dict()))


@pytest.mark.parametrize("family", ["rtn", "gptq"])
def test_more_bits_less_error(dense, tmp_path, family):
    made = [quantize_peer(dense, tmp_path / f"{bits}", f"{family}-{bits}", **TEXT) for bits in BITS]
    errors = [summary.output_error for summary in made]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0]
    assert [summary.nominal_bits_per_weight for summary in made] == list(BITS)


def test_calibration_pays(dense, tmp_path):
    names = ("gptq-act-order-2", "gptq-2", "rtn-2")
    made = [quantize_peer(dense, tmp_path / name, name, **TEXT) for name in names]
    assert made[0].output_error < made[1].output_error < made[2].output_error
    assert made[0].true_bits_per_weight > made[1].true_bits_per_weight == made[2].true_bits_per_weight


def test_the_checkpoint_is_an_ordinary_model(dense, tmp_path):
    quantize_peer(dense, tmp_path / "out", "rtn-8", **TEXT)
    options = {"texts": ["builtin"], "context": 64, "max_windows": 2, "device": "cpu"}
    scores = [evaluate(str(model), **options) for model in (dense, tmp_path / "out")]
    assert scores[1].true_bits_per_weight is None
    assert scores[1].texts["builtin"].perplexity == pytest.approx(scores[0].texts["builtin"].perplexity, rel=0.01)
    weights = [AutoModelForCausalLM.from_pretrained(model).lm_head.weight for model in (dense, tmp_path / "out")]
    assert torch.equal(*weights)


def test_a_mixture_is_written_as_its_makers_wrote_it(tmp_path):
    dense = save_tiny_mixture(tmp_path / "dense")
    quantize_peer(dense, tmp_path / "out", "rtn-8", **TEXT)
    original, rounded = (load_file(path / "model.safetensors") for path in (dense, tmp_path / "out"))
    assert rounded.keys() == original.keys()
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert 0 < (rounded[expert] - original[expert]).norm() < 0.01 * original[expert].norm()


def test_names():
    assert {"rtn-4", "gptq-2", "gptq-3"} <= set(peer_names())
    for name in ("gptq-5", "gptq", "magic-2", "gptq-x"):
        with pytest.raises(ConfigError, match=r"gptq-2.*"):
            find_peer(name)
