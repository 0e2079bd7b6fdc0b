import json

import pytest

from flame.errors import ConfigError
from flame.models import load_config, resolve_config


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, ["model_type is required", "gla"]),
        ({"model_type": "transfomer"}, ["'transfomer'", "did you mean 'transformer'"]),
        ({"model_type": "gla", "num_head": 4}, ["num_head", "did you mean 'num_heads'"]),
        ({"model_type": "gla", "num_heads": "4"}, ["model.num_heads", "whole number"]),
        ({"model_type": "gla", "num_heads": 3}, ["expand_k", "num_heads"]),
        ({"model_type": "transformer", "num_heads": 12, "num_kv_heads": 5, "hidden_size": 768}, ["num_kv_heads", "12"]),
        ({"model_type": "gla", "attn": {"layers": [0]}}, ["model.attn", "num_heads", "required"]),
        ({"model_type": "gla", "attn": {"layers": [99], "num_heads": 4}}, ["99", "no layer"]),
        ({"model_type": "gla", "layer_types": ["gla"]}, ["layer_types", "24"]),
        ({"model_type": "gla", "attnres_block_size": 3}, ["attnres_block_size"]),
        ({"model_type": "gla", "feature_map": "tanh"}, ["feature_map", "'relu'"]),
    ],
)
def test_a_bad_model_key_is_refused_with_what_would_be_accepted(values, words):
    with pytest.raises(ConfigError) as caught:
        resolve_config(values)
    for word in words:
        assert word in str(caught.value)


def test_the_dictionary_of_a_config_builds_the_same_config(tmp_path):
    config = resolve_config({"model_type": "gla", "hidden_size": 64, "attn": [{"layers": [1], "num_heads": 4}]})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config.to_dict(), "architectures": ["GLAForCausalLM"], "torch_dtype": "bfloat16"}))
    assert load_config(tmp_path) == load_config(file) == config


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        load_config(tmp_path)
