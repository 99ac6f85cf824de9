import json

import pytest
from transformers import DbrxConfig
from typer.testing import CliRunner

import arbllm
from arbllm.cli.app import app
from arbllm.errors import ArbllmError, ModelError
from arbllm.model.distill import LENGTH
from arbllm.model.events import BlockFinished
from arbllm.model.resume import FinishedBlock, Progress, unfinished_directory
from arbllm.plan import plan
from tests.model.tiny_models import tiny_model
from tests.tiny import save_tiny, save_tiny_mixture

CONFIG = arbllm.BinarizationConfig(iterations=1, allocation="uniform")
TEXT = {"windows": 3, "window_length": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), max_position_embeddings=4096)


def test_models_that_the_job_would_refuse_are_refused(dense, tmp_path):
    arbllm.quantize(dense, tmp_path / "packed", config=CONFIG, calibration="builtin", device="cpu", tune=0, **TEXT)
    with pytest.raises(ModelError, match=r"packed: is quantized already \(arbllm\); start from the original model"):
        plan(tmp_path / "packed", tmp_path / "out", **TEXT)
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 32, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "rope_theta": 10_000.0}
    config = DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, attn_config=attention, ffn_config=experts)
    config.architectures = ["DbrxForCausalLM"]
    config.save_pretrained(tmp_path / "unknown")
    with pytest.raises(ModelError, match=r"blocks\.0: most of its weights .*ffn\.experts\.mlp\.w1"):
        plan(tmp_path / "unknown", tmp_path / "out", **TEXT)


def test_experts_chosen_by_a_number_for_each_layer(tmp_path):
    tiny_model("hunyuan-moe").save_pretrained(tmp_path / "dense")
    assert plan(tmp_path / "dense", tmp_path / "packed", config=CONFIG, **TEXT).linears == 3 * (4 + 3 + 8 * 2)


def test_experts_have_hessians_each_and_the_tokens_that_come_to_them(tmp_path):
    dense = save_tiny_mixture(tmp_path / "dense")
    foretold = plan(dense, tmp_path / "packed", config=CONFIG, tune=0, **TEXT)
    assert foretold.linears == 3 * (4 + 4 * 2)
    attention, experts = 3 * 32**2, 4 * (32**2 + 56**2)
    assert foretold.memory["hessians"] == 4 * (attention + experts)
    distilled = plan(dense, tmp_path / "packed", config=CONFIG, tune=0, distill=1, windows=1, window_length=128)
    assert distilled.stage == "distilling"
    wide = sum(map(sum, [(32, 32), (16, 32), (16, 32), (32, 32)])) + 2 * (32 + 112 + 56 + 32)  # two of four a token
    assert distilled.memory["activations"] == 3 * int(1.3 * 4 * min(128, LENGTH) * wide)


@pytest.mark.parametrize("embedding_bits", [8, 16])
def test_the_result_is_as_large_as_foretold(dense, tmp_path, embedding_bits):
    options = {"config": CONFIG, "embedding_bits": embedding_bits, **TEXT}
    foretold = plan(dense, tmp_path / "packed", **options)
    made = arbllm.quantize(dense, tmp_path / "packed", calibration="builtin", device="cpu", tune=0, **options)
    assert (foretold.linears, foretold.weights) == (made.linears, made.weights)
    assert made.true_bits_per_weight <= foretold.true_bits_per_weight == 2.25
    headers = 190 * 200
    assert made.bytes_on_disk <= foretold.result_bytes < made.bytes_on_disk + headers


def test_nothing_but_config_is_read(dense, tmp_path):
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    assert plan(tmp_path, tmp_path / "out", **TEXT).linears == 14
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_memory_by_part(dense, tmp_path):
    config = {"config": CONFIG}
    whole, streamed = (plan(dense, tmp_path / "out", stream=stream, **config, **TEXT) for stream in (False, True))
    assert whole.stage == streamed.stage == "blocks"
    assert whole.peak_memory_bytes == sum(whole.memory.values())
    assert whole.memory["activations"] == 2 * 3 * 32 * 32 * 4
    assert streamed.memory["outside_blocks"] + streamed.memory["packed"] < whole.memory["model"]
    assert plan(dense, tmp_path / "out", tune=0, **config, **TEXT).memory["activations"] == 3 * 32 * 32 * 4


def test_the_stage_that_takes_the_most(dense, tmp_path):
    """Of long text the activations are large, of a few long windows what measuring takes."""
    few, many = (
        {"windows": windows, "window_length": length, "tune": 0} for windows, length in ((1, 4096), (1000, 128))
    )
    assert plan(dense, tmp_path / "out", **few).stage == "measuring"
    assert plan(dense, tmp_path / "out", **many).stage == "blocks"
    distilled = plan(dense, tmp_path / "out", distill=1, **few | {"window_length": 128})
    assert distilled.stage == "distilling"
    assert distilled.peak_memory_bytes == sum(distilled.memory.values())


def test_the_time_comes_from_finished_blocks(dense, tmp_path):
    assert plan(dense, tmp_path / "out", **TEXT).seconds is None
    directory = unfinished_directory(tmp_path / "out")
    directory.mkdir()
    event = BlockFinished(0, 2, 21.0, 1.0, 1.0, 1.0, 1.0, 1)
    Progress(directory, {}).keep_block(0, FinishedBlock({}, {}, (event,)))
    assert plan(dense, tmp_path / "out", **TEXT).seconds == 42


def test_a_coding_that_takes_more_than_it_saves_is_foretold(dense, tmp_path):
    options = {"config": arbllm.BinarizationConfig("arb-rc", iterations=1), **TEXT}
    foretold = plan(dense, tmp_path / "packed", bitmap="csr", **options)
    arbllm.quantize(dense, tmp_path / "packed", bitmap="csr", calibration="builtin", device="cpu", **options)
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size <= foretold.result_bytes
    assert plan(dense, tmp_path / "packed", bitmap="raw", **options).result_bytes < foretold.result_bytes


def test_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="GGUF file has no config"):
        plan(tmp_path / "model.gguf", tmp_path / "out")


def test_no_model(tmp_path):
    with pytest.raises(ModelError, match="cannot be built"):
        plan(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": True, "distill": 1}, "leave out stream, or distill"),
        ({"distill": -1}, "distill must be a number of steps"),
        ({"config": arbllm.BinarizationConfig(method="arb"), "tune": 1}, "arb has no column scales"),
        ({"embedding_bits": 4}, "choose 8, or 16"),
        ({"config": arbllm.BinarizationConfig(bits=1.1)}, "the linears take at least"),
        ({"window_length": 10**6}, "longer than the model's"),
        ({"windows": 0}, "at least one window"),
        ({"distill": 1, "distill_windows": 0}, "at least one window"),
        ({"dtype": "float99"}, "dtype 'float99' is unknown"),
        ({"distill_windows": 4}, "of no use without distill"),
        ({"bitmap": "zip"}, "bitmap 'zip' is unknown"),
    ],
)
def test_what_the_job_would_refuse_is_refused(dense, tmp_path, options, message):
    with pytest.raises(ArbllmError, match=message):
        plan(dense, tmp_path / "out", **options)


def test_the_command_writes_nothing(dense, tmp_path):
    arguments = ["quantize", str(dense), str(tmp_path / "out"), "--dry-run", "--bits", "2.5"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "at most 2.500" in shown.stdout
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert values["true_bits_per_weight"] == pytest.approx(2.5, abs=1e-3)
    assert list(tmp_path.iterdir()) == []
