from pathlib import Path

import pytest
import torch
from golden import assert_golden
from properties import (
    assert_decode_equals_prefill,
    assert_loss_equals_logits,
    assert_packed_equals_separate,
    small_model,
    tokens,
)

from flame.config import load_job
from flame.errors import ConfigError
from flame.models import build_model

MAMBA = {"model_type": "log_linear_mamba2", "head_dim": 16, "state_size": 8}
DELTA = {"model_type": "log_linear_gated_deltanet", "num_heads": 2, "head_dim": 16}
CONFIGS = {
    "mamba2": MAMBA,
    "mamba2_options": {
        **MAMBA, "n_groups": 2, "D_has_hdim": True, "use_bias": True, "conv_init": 0.1, "num_levels": 4,
        "norm_before_gate": True,
    },
    "mamba2_plain": {**MAMBA, "rmsnorm": False, "use_conv_bias": False, "dt_limit": [0.01, 0.5]},
    "delta": DELTA,
    "delta_options": {
        **DELTA, "num_v_heads": 4, "expand_v": 0.5, "allow_neg_eigval": True, "output_gate_activation": "sigmoid",
        "use_short_conv": False, "num_levels": 4, "attn": {"layers": [1], "num_heads": 4, "window_size": 9},
    },
    "delta_plain": {**DELTA, "use_gate": False, "attnres_block_size": 2},
}  # fmt: skip


def lively_model(name):
    """Level weights that differ, so that a level mistaken for another shows."""
    model = small_model(CONFIGS[name])
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".L"):
                parameter.copy_(3 * torch.randn(parameter.shape, generator=rng))
    return model


def test_golden_logits_and_gradients(golden_dir):
    assert_golden(golden_dir, "log_linear_mamba2")


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_decode_equals_prefill(name):
    assert_decode_equals_prefill(lively_model(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name):
    assert_packed_equals_separate(lively_model(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_equals_recurrent(name, monkeypatch):
    model = lively_model(name)
    ids = tokens(2, 79)
    chunked = model(ids).logits
    monkeypatch.setenv("FLAME_BACKEND", "reference")
    torch.testing.assert_close(model(ids).logits, chunked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mamba2", "delta"])
def test_summed_loss_equals_cross_entropy_of_the_logits(name):
    assert_loss_equals_logits(lively_model(name))


@pytest.mark.parametrize("name", ["mamba2", "delta"])
def test_decode_state_does_not_grow_with_the_context(name):
    model = lively_model(name)
    caches = []
    for length in (3, 90):
        cache = model.new_cache()
        with torch.no_grad():
            model(tokens(1, length), cache=cache)
        caches.append({key: value.shape for key, value in cache.layers[0].items()})
    assert caches[0] == caches[1]
    assert caches[0]["state"][1] == 14


@pytest.mark.parametrize("name", ["mamba2", "delta"])
def test_level_weights_start_equal_and_do_not_decay(name):
    model = small_model(CONFIGS[name])
    scales = {key: value for key, value in model.named_parameters() if key.endswith(".L")}
    assert len(scales) == 2
    assert all((value == 1).all() for value in scales.values())
    assert scales.keys() <= model.no_weight_decay()


def test_mamba_heads_start_at_rates_1_to_H():
    mixer = small_model(CONFIGS["mamba2"]).blocks[0].token_mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 5.0))


def test_flops_grow_by_the_log_of_the_sequence():
    with torch.device("meta"):
        for model_type in ("log_linear_mamba2", "log_linear_gated_deltanet"):
            model = build_model({"model_type": model_type, "num_hidden_layers": 2})
            a, b, c = (model.flops_per_token(n) for n in (1024, 2048, 4096))
            assert b - a == c - b > 0
            assert model.flops_per_token(1 << 15) == model.flops_per_token(1 << 14)


@pytest.mark.parametrize(
    "config, names",
    [
        ({**MAMBA, "num_levels": 1}, "num_levels"),
        ({**MAMBA, "residual_in_fp32": True}, "residual_in_fp32"),
        ({**MAMBA, "head_dim": 24}, "head_dim"),
        ({**DELTA, "num_levels": 1}, "num_levels"),
        ({**DELTA, "num_v_heads": 3}, "num_v_heads"),
    ],
)
def test_impossible_configs_name_the_key(config, names):
    with pytest.raises(ConfigError, match=names):
        build_model({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, **config})


@pytest.mark.parametrize("size, low, high", [("340M", 300e6, 400e6), ("1.3B", 1.25e9, 1.45e9)])
@pytest.mark.parametrize("system", ["log_linear_mamba2", "log_linear_gated_deltanet"])
def test_train_configs_have_the_size_in_their_name(system, size, low, high):
    job = load_job(Path(__file__).parents[2] / "train_configs" / f"{system}_{size}.toml", [])
    assert job.model.keys["model_type"] == system
    with torch.device("meta"):
        assert low < build_model(job.model.keys).parameter_count < high
