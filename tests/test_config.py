import pytest

from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError


def test_defaults_and_round_trip():
    config = BinarizationConfig(method="arb-x", groups=4, damping=0.02)
    assert BinarizationConfig.from_dict(config.to_dict()) == config
    assert BinarizationConfig().to_dict() == {
        "method": "arb-rcx",
        "bits": 2.25,
        "allocation": "measured",
        "scale_block": 512,
        "trellis": True,
        "partition": "cgb",
        "groups": 2,
        "block_size": 128,
        "iterations": 15,
        "split_on": "weight",
        "compensation": "exact",
        "damping": 0.01,
    }


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("method", "gptq", "billm, arb, arb-x, arb-rc, arb-rcx"),
        ("bits", 1.0, "between 1.1 and 4"),
        ("bits", 4.5, "between 1.1 and 4"),
        ("bits", "2", "between 1.1 and 4"),
        ("bits", float("nan"), "between 1.1 and 4"),
        ("allocation", "equal", "measured, uniform"),
        ("scale_block", 4, "at least 8"),
        ("scale_block", 512.0, "whole number"),
        ("trellis", 1, "true or false"),
        ("trellis", None, "true or false"),
        ("partition", "rows", "column\\+group"),
        ("groups", 3, "2, 4"),
        ("split_on", "x", "weight, saliency"),
        ("compensation", "none", "exact, reference"),
        ("block_size", 4, "at least 8"),
        ("block_size", 12.5, "whole number"),
        ("iterations", -1, "at least 0"),
        ("damping", 0, "above 0 and below 1"),
    ],
)
def test_bad_options_name_what_is_allowed(option, value, says):
    with pytest.raises(ConfigError, match=says):
        BinarizationConfig(**{option: value})


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="unknown option 'colour'"):
        BinarizationConfig.from_dict({"colour": 1})


@pytest.mark.parametrize("method", ["billm", "arb", "arb-x", "arb-rc"])
def test_bits_belong_to_joint_refinement_alone(method):
    assert BinarizationConfig(method).bits is None
    with pytest.raises(ConfigError, match="choose arb-rcx"):
        BinarizationConfig(method, bits=2.25)


def test_bits_of_joint_refinement():
    assert BinarizationConfig().bits == BinarizationConfig("arb-rcx", bits=None).bits == 2.25
    assert BinarizationConfig(bits=3).bits == 3
    for bits in (1.1, 4.0):
        assert BinarizationConfig.from_dict(BinarizationConfig(bits=bits).to_dict()).bits == bits
