"""Folders of every system in and out of transformers."""

import json

import pytest
import torch
from properties import tokens

from flame.errors import ConfigError
from flame.models import build_model, initialize_weights
from flame.models.hf import CONFIG, export_model, load_model, register_with_transformers
from flame.models.registry import systems

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
# What a system needs to be this small; others take two heads, or have none.
NEEDS = {
    "based": {"num_heads": 2, "num_key_value_heads": 2},
    "hgrn": {},
    "hgrn2": {"expand_ratio": 16},
    "mamba": {},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "log_linear_mamba2": {"head_dim": 16, "num_heads": 4},
    "nsa": {"num_heads": 2, "num_kv_heads": 1},
    "rebased": {"num_heads": 2, "num_key_value_heads": 2},
    "rodimus": {},
    "rwkv7": {"head_dim": 16},
    "samba": {"attn": {"layers": [1], "num_heads": 2}},
}


def small(model_type, **extra):
    model = build_model({**SMALL, "model_type": model_type, **NEEDS.get(model_type, {"num_heads": 2}), **extra})
    initialize_weights(model, 3)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_with_transformers()


@pytest.mark.parametrize("model_type", sorted(systems()))
def test_transformers_computes_the_same_and_saves_what_flame_reads(tmp_path, model_type):
    try:
        model = small(model_type)
    except ConfigError as error:
        pytest.skip(f"no small config of {model_type} is known: add it to NEEDS. {error}")
    ids = tokens(1, 19)
    export_model(model, tmp_path / "exported")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    expected = model(ids).logits
    assert torch.equal(there(ids).logits, expected)
    there.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(ids).logits, expected)


@pytest.mark.parametrize("model_type", ["gla", "mamba2", "transformer"])
def test_tied_weights_stay_tied_in_transformers(tmp_path, model_type):
    model, ids = small(model_type, tie_word_embeddings=True), tokens(1, 19)
    export_model(model, tmp_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert there.get_output_embeddings().weight is there.get_input_embeddings().weight
    assert torch.equal(there(ids).logits, model(ids).logits)


def test_transformers_generates_what_greedy_decoding_gives_and_the_same_loss(tmp_path):
    model, ids = small("gla", eos_token_id=None), tokens(1, 9)
    export_model(model, tmp_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(there.generate(ids, max_new_tokens=6, do_sample=False), expected)
    ours = model(ids[:, :-1], labels=ids[:, 1:]).loss_sum / (ids.shape[1] - 1)
    torch.testing.assert_close(there(ids, labels=ids).loss, ours)


def test_a_folder_in_bfloat16_says_so_and_loads_as_such(tmp_path):
    export_model(small("gla"), tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / CONFIG).read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_keys_that_a_config_leaves_out_take_the_defaults_of_the_system(tmp_path):
    export_model(small("gla"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**SMALL, "model_type": "gla", "num_heads": 2}))
    there, here = transformers.AutoConfig.from_pretrained(tmp_path).flame_config(), load_model(tmp_path).config
    assert there == here
