"""Delta-rule systems and MesaNet: golden agreement, decode, packing, backends, sizes, decay sets, refusals."""

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

from flame.errors import ConfigError
from flame.models import build_model

ATTENTION = {"layers": [1], "num_heads": 4, "window_size": 9}
CONFIGS = {
    "delta_net": {"model_type": "delta_net", "num_heads": 2},
    "delta_net_options": {
        "model_type": "delta_net", "num_heads": 4, "expand_k": 0.5, "expand_v": 2, "use_gate": True, "use_beta": False,
        "qk_norm": "sum", "qk_activation": "elu", "use_short_conv": False, "attn": ATTENTION,
    },
    "delta_net_relu": {
        "model_type": "delta_net", "num_heads": 2, "qk_activation": "relu", "allow_neg_eigval": True,
    },
    "gated_deltanet": {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 16},
    "gated_deltanet_options": {
        "model_type": "gated_deltanet", "num_heads": 2, "num_v_heads": 4, "head_dim": 16, "expand_v": 0.5,
        "allow_neg_eigval": True, "output_gate_activation": "sigmoid", "use_short_conv": False, "attn": ATTENTION,
    },
    "gated_deltanet_plain": {
        "model_type": "gated_deltanet", "num_heads": 2, "head_dim": 16, "use_gate": False, "attnres_block_size": 2,
    },
    "gated_deltaproduct": {"model_type": "gated_deltaproduct", "num_heads": 2, "head_dim": 16},
    "gated_deltaproduct_options": {
        "model_type": "gated_deltaproduct", "num_heads": 2, "head_dim": 16, "num_householder": 3, "expand_v": 1,
        "use_forget_gate": True, "allow_neg_eigval": True, "use_output_gate": False,
    },
    "comba": {"model_type": "comba", "num_heads": 2, "head_dim": 16},
    "comba_options": {
        "model_type": "comba", "num_heads": 2, "num_v_heads": 4, "head_dim": 16, "use_output_gate": False,
        "use_short_conv": False,
    },
    "kda": {"model_type": "kda", "num_heads": 2, "head_dim": 16},
    "kda_options": {
        "model_type": "kda", "num_heads": 2, "num_v_heads": 4, "head_dim": 16, "expand_v": 0.5, "safe_gate": True,
        "lower_bound": -5.0, "allow_neg_eigval": True, "use_short_conv": False, "attn": ATTENTION,
    },
    "rwkv7": {
        "model_type": "rwkv7", "head_dim": 16, "decay_low_rank_dim": 8, "gate_low_rank_dim": 8, "a_low_rank_dim": 8,
        "v_low_rank_dim": 4,
    },
    "rwkv7_options": {
        "model_type": "rwkv7", "head_dim": None, "num_heads": 4, "decay_low_rank_dim": None, "gate_low_rank_dim": None,
        "a_low_rank_dim": None, "v_low_rank_dim": None, "norm_bias": False, "norm_first": False, "fuse_norm": False,
        "value_dim": [64, 64, 64], "num_hidden_layers": 3, "attn": ATTENTION,
    },
    "mesa_net": {"model_type": "mesa_net", "num_heads": 2, "head_dim": 16},
    "mesa_net_gated": {
        "model_type": "mesa_net", "num_heads": 2, "head_dim": 16, "use_output_gate": True, "attn": ATTENTION,
    },
}  # fmt: skip

MODELS = ["delta_net", "gated_deltanet", "gated_deltaproduct", "comba", "kda", "rwkv7", "mesa_net"]


def lively_model(name):
    """A small model; RWKV-7 starts with zero output projections, which would hide its mixers."""
    model = small_model(CONFIGS[name])
    if name.startswith("rwkv7"):
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize("name", [case + kind for case in MODELS for kind in ("", "_varlen")])
def test_golden_logits_and_gradients(golden_dir, name):
    if name.startswith("mesa_net"):  # the reference keeps unit keys in fp16
        assert_golden(golden_dir, name, logits_atol=1e-2, gradient_rtol=0.08)
    else:
        assert_golden(golden_dir, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_decode_equals_prefill(name):
    assert_decode_equals_prefill(lively_model(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name):
    assert_packed_equals_separate(lively_model(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_equals_recurrent(name, monkeypatch):
    model = lively_model(name)
    ids = tokens(2, 39)
    chunked = model(ids).logits
    monkeypatch.setenv("FLAME_BACKEND", "reference")
    torch.testing.assert_close(model(ids).logits, chunked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "rwkv7"])  # l2warp adds to RWKV-7's gradient only
def test_summed_loss_equals_cross_entropy_of_the_logits(name):
    assert_loss_equals_logits(lively_model(name))
