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

from flame.models import build_model
from flame.models.mixers.gla import GatedLinearAttention

CONFIGS = {
    "transformer": {"model_type": "transformer", "num_heads": 4},
    "transformer_gqa_window_qknorm": {
        "model_type": "transformer", "num_heads": 4, "num_kv_heads": 2, "window_size": 7, "qk_norm": True, "qkv_bias": True,
    },
    "transformer_sinks": {
        "model_type": "transformer", "num_heads": 4, "num_kv_heads": 2, "window_size": 7, "attention_sinks": True,
    },
    "gla": {"model_type": "gla", "num_heads": 2},
    "gla_options": {
        "model_type": "gla", "num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "feature_map": "relu",
        "clamp_min": -0.05, "use_output_gate": False,
    },
    "gla_hybrid": {"model_type": "gla", "num_heads": 2, "attn": {"layers": [1], "num_heads": 4, "window_size": 9}},
    "layer_types": {
        "model_type": "gla", "num_heads": 2, "num_hidden_layers": 3, "layer_types": ["gla", "transformer", "gla"],
        "layer_options": {"transformer": {"num_heads": 4, "num_kv_heads": 1}},
    },
    "attention_residual": {"model_type": "gla", "num_heads": 2, "num_hidden_layers": 3, "attnres_block_size": 2},
    "tied": {"model_type": "transformer", "num_heads": 4, "tie_word_embeddings": True},
}  # fmt: skip

GOLDEN = [
    "transformer", "transformer_varlen", "transformer_gqa_swa_qknorm", "transformer_gqa_swa_qknorm_varlen",
    "gla", "gla_varlen", "gla_hybrid_swa", "gla_hybrid_swa_varlen",
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits_and_gradients(golden_dir, name):
    assert_golden(golden_dir, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_decode_equals_prefill(name):
    assert_decode_equals_prefill(small_model(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name):
    assert_packed_equals_separate(small_model(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_summed_loss_equals_cross_entropy_of_the_logits(name):
    assert_loss_equals_logits(small_model(CONFIGS[name]))


def test_chunked_equals_recurrent(monkeypatch):
    model, ids = small_model(CONFIGS["gla"]), tokens(2, 130)
    chunked = model(ids).logits
    monkeypatch.setenv("FLAME_BACKEND", "reference")
    torch.testing.assert_close(model(ids).logits, chunked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config, parameters, keys",
    [({"model_type": "gla"}, 1365514240, 339), ({"model_type": "transformer"}, 1364297728, 219)],
)
def test_default_size_equals_the_reference(config, parameters, keys):
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


def test_a_mixer_works_alone_in_any_torch_model():
    layer = GatedLinearAttention(hidden_size=32, num_heads=2)
    assert layer(torch.randn(2, 11, 32)).shape == (2, 11, 32)


def test_flops_a_token_follow_six_times_the_matrix_weights():
    with torch.device("meta"):
        model = build_model({"model_type": "transformer", "hidden_size": 1024, "num_heads": 16})
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n)
    flops = model.flops_per_token(2048)
    attention = 3 * 4 * 24 * 1024 * 2049 / 2
    assert flops == pytest.approx(6 * weights + attention, rel=1e-9)
