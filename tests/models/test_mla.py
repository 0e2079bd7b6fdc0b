import pytest
import torch
from golden import assert_golden
from properties import (
    assert_decode_equals_prefill,
    assert_loss_equals_logits,
    assert_packed_equals_separate,
    small_model,
)

from flame.models import build_model

SHAPE = {
    "model_type": "mla", "num_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "qk_head_dim": None, "v_head_dim": 8,
}  # fmt: skip
CONFIGS = {"latent": SHAPE, "window": {**SHAPE, "window_size": 7}, "direct_queries": {**SHAPE, "q_lora_rank": None}}


@pytest.mark.parametrize("name", ["mla", "mla_varlen"])
def test_golden_logits_and_gradients(golden_dir, name):
    assert_golden(golden_dir, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_packing_and_loss_agree_with_the_plain_forward(name):
    model = small_model(CONFIGS[name])
    assert_decode_equals_prefill(model)
    assert_packed_equals_separate(model)
    assert_loss_equals_logits(model)


def test_the_cache_holds_the_latent_and_not_expanded_heads():
    model = small_model(CONFIGS["window"])
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.int64), cache=cache)
    assert {name: tuple(t.shape) for name, t in cache.layers[0].items()} == {
        "latent": (1, 7, 10),
        "k_rope": (1, 7, 1, 4),
    }


def test_default_size_equals_the_reference():
    with torch.device("meta"):
        model = build_model({"model_type": "mla"})
    assert sum(p.numel() for p in model.parameters()) == 1148829184
    assert len(model.state_dict()) == 315
