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

SHAPE = {"model_type": "path_attn", "num_heads": 4}
CONFIGS = {
    "plain": SHAPE,
    "gate_and_groups": {**SHAPE, "num_kv_heads": 2, "use_forget_gate": True},
    "bare_directions": {**SHAPE, "use_w_shortconv": False, "use_low_rank_w": False},
}


@pytest.mark.parametrize("name", ["path_attn", "path_attn_varlen"])
def test_golden_logits_and_gradients(golden_dir, name):
    assert_golden(golden_dir, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_packing_and_loss_agree_with_the_plain_forward(name):
    model = small_model(CONFIGS[name])
    assert_decode_equals_prefill(model)
    assert_packed_equals_separate(model)
    assert_loss_equals_logits(model)


def test_parameters_are_named_as_in_the_reference():
    with torch.device("meta"):
        names = build_model({**CONFIGS["gate_and_groups"], "hidden_size": 32, "num_hidden_layers": 1}).state_dict()
    prefix = "model.layers.0.attn."
    assert {name.removeprefix(prefix): tuple(x.shape) for name, x in names.items() if name.startswith(prefix)} == {
        "q_proj.weight": (32, 32), "k_proj.weight": (16, 32), "v_proj.weight": (16, 32), "o_proj.weight": (32, 32),
        "w_proj.0.weight": (32, 32), "w_proj.1.weight": (16, 32), "w_conv1d.weight": (16, 1, 3),
        "bt_proj.weight": (2, 32), "bt_proj.bias": (2,), "g_proj.weight": (4, 32), "g_proj.bias": (4,),
    }  # fmt: skip
