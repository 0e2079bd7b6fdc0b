import pytest
from golden import assert_golden
from properties import (
    assert_decode_equals_prefill,
    assert_loss_equals_logits,
    assert_packed_equals_separate,
    small_model,
)

SHAPE = {"model_type": "forgetting_transformer", "num_heads": 4}
CONFIGS = {
    "plain": SHAPE,
    "options": {**SHAPE, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True, "use_output_gate": True},
}


@pytest.mark.parametrize("name", ["forgetting_transformer", "forgetting_transformer_varlen"])
def test_golden_logits_and_gradients(golden_dir, name):
    assert_golden(golden_dir, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_packing_and_loss_agree_with_the_plain_forward(name):
    model = small_model(CONFIGS[name])
    assert_decode_equals_prefill(model)
    assert_packed_equals_separate(model)
    assert_loss_equals_logits(model)
