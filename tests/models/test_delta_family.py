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
from flame.models.context import make_context

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
    "mom": {"model_type": "mom", "num_heads": 2, "head_dim": 16},
    "mom_options": {
        "model_type": "mom", "num_heads": 2, "head_dim": 16, "num_memories": 5, "topk": 3, "shared_mem": False,
        "single_kv_proj": True, "use_output_gate": False, "expand_v": 0.5,
    },
}  # fmt: skip

MODELS = ["delta_net", "gated_deltanet", "gated_deltaproduct", "comba", "kda", "rwkv7", "mesa_net", "mom"]
GOLDEN = [name for name in MODELS if name != "mom"]  # the reference leaks between MoM's memories


def lively_model(name):
    """A small model; RWKV-7 starts with zero output projections, which would hide its mixers."""
    model = small_model(CONFIGS[name])
    if name.startswith("rwkv7"):
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize("name", [case + kind for case in GOLDEN for kind in ("", "_varlen")])
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


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mom"])  # MoM adds its balance loss
def test_summed_loss_equals_cross_entropy_of_the_logits(name):
    assert_loss_equals_logits(lively_model(name))


def test_mom_loss_adds_the_routers_balance_over_all_layers():
    model = lively_model("mom")
    ids, labels = tokens(2, 41), tokens(2, 41, seed=3)
    labels[0, :7] = -100
    logits_of_routers = []
    hooks = [b.attn.gate.register_forward_hook(lambda *a: logits_of_routers.append(a[2])) for b in model.blocks]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    p = torch.cat([x.flatten(0, 1) for x in logits_of_routers]).softmax(-1)  # [L B T, M]
    chosen = torch.nn.functional.one_hot(p.topk(2, -1).indices, 4).float().mean(0)
    balance = 0.01 * 4 * (chosen * p.mean(0)).sum()
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = model(ids, labels=labels).loss_sum
    torch.testing.assert_close(loss, plain + balance * (labels != -100).sum(), rtol=1e-5, atol=1e-3)


def test_mom_equals_memories_run_one_by_one():
    """Each memory is a Gated DeltaNet over its own tokens alone."""
    layer = lively_model("mom").blocks[0].attn
    x = torch.randn(1, 23, 32, generator=torch.Generator().manual_seed(4))
    p = layer.gate(x[0]).softmax(-1)
    weight, choice = p.topk(2, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    rows = {"q": layer.q_proj(x), **{name: getattr(layer, f"shared_{name}")(x) for name in "kvba"}}
    ctx = make_context(23, x.device)
    o = layer.remembered(rows, ctx, "")[0]
    for m in range(4):
        index = (choice == m).any(-1).nonzero()[:, 0]
        own = x[:, index]
        rows = {"q": layer.q_proj(own), **{name: getattr(layer, f"{name}_proj")[m](own) for name in "kvba"}}
        part = (weight * (choice == m)).sum(-1)[index, None, None] * layer.remembered(rows, ctx, "")[0]
        o = o.index_add(0, index, part)
    torch.testing.assert_close(layer(x), layer.output(o[None], x), atol=1e-5, rtol=1e-4)


def default_model(config):
    with torch.device("meta"):
        return build_model(config)


@pytest.mark.parametrize("model_type", MODELS)
def test_flops_grow_with_the_model_and_not_with_the_sequence(model_type):
    model = default_model({"model_type": model_type})
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    flops = model.flops_per_token(2048)
    assert model.flops_per_token(4096) == flops
    if model_type == "mom":
        assert 4 * matrices < flops < 6 * matrices
    else:
        assert 6 * matrices < flops < 2 * 6 * matrices


def test_gates_and_mixes_do_not_decay():
    gdn = small_model(CONFIGS["gated_deltanet"]).no_weight_decay()
    assert {f"model.layers.1.attn.{name}" for name in ("A_log", "dt_bias", "o_norm.weight")} <= gdn
    assert "model.layers.1.attn.q_proj.weight" not in gdn
    rwkv7 = small_model(CONFIGS["rwkv7"]).no_weight_decay()
    assert {"model.layers.1.attn.x_r", "model.layers.1.attn.r_k", "model.layers.0.ffn.x_k"} <= rwkv7
    assert "model.layers.1.attn.w_lora.lora.2.weight" not in rwkv7


def test_decay_gates_start_in_the_papers_ranges():
    layer = default_model({"model_type": "gated_deltanet"}).blocks[0].attn.to_empty(device="cpu")
    layer.reset_parameters()
    A, step = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert (A > 0).all() and (A < 16).all()
    assert (step > 0.9e-4).all() and (step < 0.101).all()


@pytest.mark.parametrize(
    "config,names",
    [
        ({"model_type": "delta_net", "num_heads": 3}, "expand_k"),
        ({"model_type": "delta_net", "qk_norm": "l3"}, "qk_norm"),
        ({"model_type": "gated_deltanet", "head_dim": 15, "expand_v": 0.5}, "expand_v"),
        ({"model_type": "gated_deltanet", "num_v_heads": 7}, "num_v_heads"),
        ({"model_type": "gated_deltaproduct", "num_householder": 0}, "num_householder"),
        ({"model_type": "gated_deltaproduct", "num_v_heads": 6}, "num_v_heads"),
        ({"model_type": "kda", "safe_gate": True}, "safe_gate"),
        ({"model_type": "kda", "lower_bound": 1.0}, "lower_bound"),
        ({"model_type": "rwkv7", "head_dim": 15}, "head_dim"),
        ({"model_type": "rwkv7", "head_dim": 16, "value_dim": [32, 64]}, "value_dim"),
        ({"model_type": "mesa_net", "lambda_lower_bound": 1.5}, "lambda_lower_bound"),
        ({"model_type": "mom", "topk": 5}, "topk"),
        ({"model_type": "mom", "use_short_conv": False}, "use_short_conv"),
    ],
)
def test_impossible_configs_name_the_key(config, names):
    with pytest.raises(ConfigError, match=names):
        build_model({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, **config})
