"""Every system whose state is a decayed sum: golden agreement, decode, packing, backends, sizes, decay sets."""

import json
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
from safetensors import safe_open

from flame.config import load_job
from flame.errors import ConfigError
from flame.models import build_model
from flame.models.mixers.based import BasedLinearAttention
from flame.models.mixers.hgrn import HGRN
from flame.models.mixers.lightnet import LightNetAttention
from flame.models.mixers.mamba2 import Mamba2
from flame.models.mixers.rebased import ReBasedLinearAttention
from flame.models.mixers.rodimus import Rodimus
from flame.models.mixers.rwkv6 import RWKV6Attention
from flame.models.mixers.samba import SambaMixer

CONFIGS = {
    "retnet": {"model_type": "retnet", "num_heads": 2},
    "retnet_options": {
        "model_type": "retnet", "num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5, "feature_map": "relu",
        "use_output_gate": False, "attn": {"layers": [1], "num_heads": 4, "window_size": 9},
    },
    "linear_attn": {"model_type": "linear_attn", "num_heads": 2},
    "linear_attn_hedgehog": {
        "model_type": "linear_attn", "num_heads": 4, "num_kv_heads": 2, "feature_map": "hedgehog",
        "tie_feature_map_qk": True, "norm_feature_map": True,
    },
    "linear_attn_elu": {
        "model_type": "linear_attn", "num_heads": 2, "feature_map": "elu", "norm_q": True, "norm_k": True,
    },
    "based": {"model_type": "based", "num_heads": 2, "num_key_value_heads": 2, "feature_dim": 4},
    "rebased": {"model_type": "rebased", "num_heads": 2, "num_key_value_heads": 2, "feature_dim": 4},
    "hgrn": {"model_type": "hgrn"},
    "hgrn_options": {"model_type": "hgrn", "expand_ratio": 1.5, "use_short_conv": True, "attnres_block_size": 2},
    "hgrn2": {"model_type": "hgrn2", "expand_ratio": 16},
    "hgrn2_options": {
        "model_type": "hgrn2", "expand_ratio": None, "num_heads": 4, "use_short_conv": True, "use_lower_bound": False,
    },
    "rwkv6": {"model_type": "rwkv6", "num_heads": 2, "proj_low_rank_dim": 4, "gate_low_rank_dim": 8},
    "rwkv6_hybrid": {
        "model_type": "rwkv6", "num_heads": 2, "proj_low_rank_dim": 4, "gate_low_rank_dim": 8, "norm_bias": False,
        "norm_first": False, "hidden_ratio": 2, "attn": {"layers": [1], "num_heads": 4},
    },
    "lightnet": {"model_type": "lightnet", "expand_ratio": 16, "gate_low_rank_dim": 8},
    "lightnet_options": {
        "model_type": "lightnet", "expand_ratio": 8, "num_heads": 2, "gate_low_rank_dim": 8, "use_short_conv": True,
    },
    "mamba": {"model_type": "mamba"},
    "mamba_options": {
        "model_type": "mamba", "expand": 1, "state_size": 8, "use_bias": True, "use_conv_bias": False, "dt_rank": 3,
        "residual_in_fp32": True, "rescale_prenorm_residual": True, "dt_init_scheme": "constant",
    },
    "samba": {"model_type": "samba", "attn": {"layers": [1], "num_heads": 4, "window_size": 9}},
    "mamba2": {"model_type": "mamba2", "head_dim": 16, "state_size": 8},
    "mamba2_options": {
        "model_type": "mamba2", "head_dim": 8, "state_size": 8, "n_groups": 2, "D_has_hdim": True, "use_bias": True,
        "norm_before_gate": True, "dt_limit": [0.01, 0.05], "conv_init": 0.1, "residual_in_fp32": False,
    },
    "gsa": {"model_type": "gsa", "num_heads": 2, "num_slots": 8},
    "gsa_options": {
        "model_type": "gsa", "num_heads": 4, "num_kv_heads": 2, "num_slots": None, "use_short_conv": True,
        "feature_map": "t2r", "exapnd_k": 0.5,
    },
    "abc": {"model_type": "abc", "num_heads": 2, "num_slots": 8},
    "abc_options": {
        "model_type": "abc", "num_heads": 2, "num_slots": None, "use_short_conv": True, "use_rope": False,
        "clamp_min": None, "clamp_max": None, "expand_v": 2,
    },
    "rodimus": {"model_type": "rodimus", "block_type": "rodimus", "expand_ratio": 16},
    "rodimus_plus": {
        "model_type": "rodimus", "expand_ratio": 16, "ska_attn": {"num_heads": 4, "window_size": 9, "qk_norm": True},
        "block_residual_in_fp32": True, "tie_word_embeddings": False, "num_hidden_layers": 3,
        "attn": {"layers": [1], "num_heads": 4},
    },
}  # fmt: skip

MODELS = [
    "retnet", "linear_attn", "hgrn", "hgrn2", "rwkv6", "lightnet", "mamba", "samba", "mamba2", "gsa", "abc", "rodimus",
]  # fmt: skip

# Parameters of the default configs, from the reference's own models.
PARAMETERS = {
    "retnet": 1351727104, "linear_attn": 1389524992, "hgrn": 1364396032, "hgrn2": 1364396032, "rwkv6": 1360224256,
    "lightnet": 1376929792, "mamba": 1400276992, "samba": 1403935488, "mamba2": 1371839488, "gsa": 1376929792,
    "abc": 1376892928,
}  # fmt: skip
KEYS = {
    "retnet": 267, "linear_attn": 435, "hgrn": 244, "hgrn2": 244, "rwkv6": 582, "lightnet": 291, "mamba": 483,
    "samba": 210, "mamba2": 435, "gsa": 267, "abc": 291,
}  # fmt: skip


@pytest.mark.parametrize("name", [case + kind for case in MODELS for kind in ("", "_varlen")])
def test_golden_logits_and_gradients(golden_dir, name):
    assert_golden(golden_dir, name)


@pytest.mark.parametrize("kind", ["", "_varlen"])
@pytest.mark.parametrize("name,mixer", [("based", BasedLinearAttention), ("rebased", ReBasedLinearAttention)])
def test_golden_layers(golden_dir, name, mixer, kind):
    tensors, config = read_layer(golden_dir, f"{name}_layer")
    layer = mixer(**{key: value for key, value in config.items() if key != "mode"}, mode=config["mode"])
    layer.load_state_dict({key[2:]: value.float() for key, value in tensors.items() if key.startswith("w.")})
    if kind:
        tensors, _ = read_layer(golden_dir, f"{name}_layer{kind}")
    # The reference's layers know no documents: their packed case is one long row.
    output = layer(tensors["hidden_states"].float())
    torch.testing.assert_close(output, tensors["output"].float(), atol=2e-4, rtol=0)
    output.square().mean().backward()
    for key, parameter in layer.named_parameters():
        expected = tensors[f"g.{key}"].float()
        assert (parameter.grad - expected).norm() < 0.02 * expected.norm(), key


def read_layer(folder, name):
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_decode_equals_prefill(name):
    assert_decode_equals_prefill(small_model(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_ones(name):
    assert_packed_equals_separate(small_model(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_equals_recurrent(name, monkeypatch):
    model = small_model(CONFIGS[name])
    ids = tokens(2, 39)
    chunked = model(ids).logits
    monkeypatch.setenv("FLAME_BACKEND", "reference")
    torch.testing.assert_close(model(ids).logits, chunked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_summed_loss_equals_cross_entropy_of_the_logits(name):
    assert_loss_equals_logits(small_model(CONFIGS[name]))


def default_model(config):
    with torch.device("meta"):
        return build_model(config)


@pytest.mark.parametrize("model_type", PARAMETERS)
def test_default_model_has_the_reference_size(model_type):
    model = default_model({"model_type": model_type})
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[model_type]
    assert len(model.state_dict()) == KEYS[model_type]


@pytest.mark.parametrize(
    "options,parameters,keys",
    [
        ({"block_type": "rodimus"}, 895276032, 411),
        ({"block_type": "rodimus_plus", "ska_attn": {"num_heads": 16}}, 1607095296, 627),
        ({}, 1607095296, 627),
    ],
)
def test_default_rodimus_has_the_reference_size(options, parameters, keys):
    model = default_model({"model_type": "rodimus", **options})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize("model_type", [*PARAMETERS, "rodimus", "based", "rebased"])
def test_flops_grow_with_the_model_and_not_with_short_sequences(model_type):
    options = {"based": {"num_heads": 16, "num_key_value_heads": 16}}.get(model_type, {})
    model = default_model({"model_type": model_type, **options})
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    flops = model.flops_per_token(2048)
    assert 6 * matrices < flops < 2 * 6 * matrices
    hybrid = model_type in ("samba", "rodimus")  # windows fill up
    assert model.flops_per_token(4096) == flops or hybrid


def test_initial_weights_follow_the_papers():
    def parameters(**config):
        return dict(small_model({"hidden_size": 64, "initializer_range": 0.02, **config}).named_parameters())

    mamba = parameters(model_type="mamba", dt_min=0.01, dt_max=0.02)
    prefix = "backbone.layers.0.mixer."
    step = torch.nn.functional.softplus(mamba[prefix + "dt_proj.bias"])
    assert step.min() > 0.0099 and step.max() < 0.0201
    torch.testing.assert_close(mamba[prefix + "A_log"][3].exp(), torch.arange(1.0, 17.0))
    assert 0.4 < mamba[prefix + "conv1d.weight"].abs().max() <= 0.5
    assert mamba[prefix + "dt_proj.weight"].abs().max() <= 4**-0.5

    mamba2 = parameters(model_type="mamba2", head_dim=8, A_init_range=[2.0, 4.0])
    assert mamba2[prefix + "A_log"].exp().min() >= 2 and mamba2[prefix + "A_log"].exp().max() <= 4
    assert mamba2[prefix + "out_proj.weight"].abs().max() <= (128 * 2) ** -0.5

    rwkv6 = parameters(model_type="rwkv6", num_heads=2)
    assert not rwkv6["model.layers.0.attn.w_proj.linear.lora.0.weight"].any()  # every log decay starts at -1
    loras = rwkv6[
        "model.layers.0.attn.w_proj.linear.lora.2.weight"
    ]  # [32, 64]: rows orthogonal, longer for more columns
    torch.testing.assert_close(loras @ loras.T, torch.eye(32) * 0.02, atol=1e-6, rtol=0)

    rodimus = parameters(model_type="rodimus", block_type="rodimus")
    share = torch.sigmoid(rodimus["model.layers.0.mixer.tau_gate_proj.bias"])
    assert share.min() > 1 / 16 - 1e-6 and share.max() < 0.9 + 1e-6


@pytest.mark.parametrize(
    "mixer,options",
    [
        (HGRN, {}),
        (LightNetAttention, {"expand_ratio": 16}),
        (SambaMixer, {}),
        (Mamba2, {"head_dim": 16}),
        (RWKV6Attention, {"num_heads": 2}),
        (Rodimus, {}),
    ],
)
def test_mixers_work_alone_in_any_torch_model(mixer, options):
    layer = mixer(hidden_size=32, **options)
    assert layer(torch.randn(2, 11, 32)).shape == (2, 11, 32)
    with pytest.raises(ConfigError, match="hiden_size"):
        mixer(hiden_size=32)


def test_gates_and_biases_do_not_decay():
    mamba = small_model(CONFIGS["mamba"]).no_weight_decay()
    assert {"backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D", "backbone.norm_f.weight"} <= mamba
    assert "backbone.layers.0.mixer.in_proj.weight" not in mamba
    mamba2 = small_model(CONFIGS["mamba2"]).no_weight_decay()
    assert {f"backbone.layers.1.mixer.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight")} <= mamba2
    rwkv6 = small_model(CONFIGS["rwkv6"]).no_weight_decay()
    assert {"model.layers.1.attn.bonus", "model.layers.1.attn.x_bias", "model.layers.0.ffn.key.mu"} <= rwkv6


@pytest.mark.parametrize(
    "config,names",
    [
        ({"model_type": "retnet", "num_heads": 3}, "num_heads|expand_k"),
        ({"model_type": "retnet", "feature_map": "swsh"}, "swish"),
        ({"model_type": "hgrn2", "expand_ratio": 24}, "expand_ratio"),
        ({"model_type": "mamba", "intermediate_size": 63}, "intermediate_size"),
        ({"model_type": "mamba2", "num_heads": 5}, "num_heads"),
        ({"model_type": "mamba2", "n_groups": 3, "head_dim": 16}, "n_groups"),
        ({"model_type": "gsa", "expand_v": 2}, "expand_v"),
        ({"model_type": "samba", "rescale_prenorm_residual": True}, "rescale_prenorm_residual"),
        ({"model_type": "rebased", "num_heads": 2}, "num_key_value_heads"),
        ({"model_type": "rodimus", "use_short_conv": False}, "use_short_conv"),
        ({"model_type": "rwkv6", "attnres_block_size": 2}, "attnres_block_size"),
    ],
)
def test_impossible_configs_name_the_key(config, names):
    with pytest.raises(ConfigError, match=names):
        build_model({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, **config})


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_weights_compute_and_keep_states_in_fp32(name):
    model, ids = small_model(CONFIGS[name]), tokens(1, 40)
    bounds = torch.tensor([0, 7, 30, 40], dtype=torch.int32)
    exact = model(ids, cu_seqlens=bounds).logits.detach()
    model = model.to(torch.bfloat16)
    rounded = model(ids, cu_seqlens=bounds).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.06 * exact.norm()
    model(ids, labels=ids, cu_seqlens=bounds).loss_sum.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, cache=cache)
    states = [value for layer in cache.layers for key, value in layer.items() if "state" in key]
    assert states and all(state.dtype == torch.float32 for state in states)


JOBS = Path(__file__).parents[2] / "train_configs"


@pytest.mark.parametrize("size,low,high", [("340M", 300e6, 400e6), ("1.3B", 1.25e9, 1.45e9)])
@pytest.mark.parametrize("system", [*MODELS, "based", "rebased"])
def test_train_configs_have_the_size_in_their_name(system, size, low, high):
    job = load_job(JOBS / f"{system}_{size}.toml", [])
    assert job.model.keys["model_type"] == system
    model = default_model(job.model.keys)
    assert low < sum(p.numel() for p in model.parameters()) < high
