"""NSA and MoBA as whole models."""

import pytest
import torch
from properties import (
    assert_decode_equals_prefill,
    assert_loss_equals_logits,
    assert_packed_equals_separate,
    small_model,
    tokens,
)

from flame.errors import ConfigError
from flame.models import build_model

NSA_SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 4, "block_counts": 3, "window_size": 5}
NSA = {"model_type": "nsa", **NSA_SHAPE}
MOBA = {"model_type": "moba", "num_heads": 4, "moba_chunk_size": 4, "moba_topk": 3}
CONFIGS = {
    "nsa": NSA,
    "nsa_options": {**NSA, "num_kv_heads": None, "qkv_bias": True, "block_counts": 5, "window_size": 0},
    "nsa_few_blocks": {**NSA, "num_kv_heads": 1, "block_counts": 1, "rope_theta": 500.0},
    "moba": MOBA,
    "moba_options": {**MOBA, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True, "use_output_gate": True},
    "moba_full": {**MOBA, "moba_topk": 1},
    "hybrid": {**MOBA, "layer_types": ["moba", "nsa"], "layer_options": {"nsa": NSA_SHAPE}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_packing_and_loss_agree_with_the_plain_forward(name):
    model = small_model(CONFIGS[name])
    assert_decode_equals_prefill(model)
    assert_packed_equals_separate(model)
    assert_loss_equals_logits(model)


@pytest.mark.parametrize(
    "config, expected",
    [
        (NSA, {"q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "o_proj.weight"}),
        (MOBA, {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_norm.weight"}),
        (
            {**MOBA, "qk_norm": True, "use_output_gate": True},
            {
                *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_norm.weight"),
                *("q_norm.weight", "k_norm.weight", "g_proj.0.weight", "g_proj.1.weight"),
            },
        ),
    ],
)
def test_parameter_names_are_the_references(config, expected):
    names = small_model(config).state_dict()
    prefix = "model.layers.0.attn."
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == expected


def test_default_shapes_are_the_references():
    with torch.device("meta"):
        nsa, moba = (build_model({"model_type": name, "num_hidden_layers": 1}) for name in ("nsa", "moba"))
    shapes = {name.split("attn.")[-1]: tuple(x.shape) for name, x in nsa.state_dict().items()}
    assert (shapes["q_proj.weight"], shapes["k_proj.weight"]) == ((2048, 2048), (128, 2048))
    assert (shapes["g_proj.weight"], shapes["o_proj.weight"]) == ((192, 2048), (2048, 2048))
    shapes = {name.split("attn.")[-1]: tuple(x.shape) for name, x in moba.state_dict().items()}
    assert (shapes["k_proj.weight"], shapes["o_norm.weight"]) == ((2048, 2048), (64,))


@torch.no_grad()
@pytest.mark.parametrize("name, means", [("nsa", {"k_means", "v_means"}), ("moba", {"k_means"})])
def test_the_cache_keeps_the_means_of_complete_blocks(name, means):
    model = small_model(CONFIGS[name])
    cache = model.new_cache()
    for length in (6, 1, 1, 9):
        model(tokens(2, length), cache=cache)
    layer = cache.layers[0]
    assert set(layer) == {"k", "v"} | means
    assert all(layer[key].shape[1] == 17 // 4 for key in means)
    torch.testing.assert_close(layer["k_means"], layer["k"][:, :16].unflatten(1, (4, 4)).mean(2))


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"head_dim": 7}, {"block_counts": 0}, {"window_size": -1}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        build_model({**NSA, "hidden_size": 32, **change})
