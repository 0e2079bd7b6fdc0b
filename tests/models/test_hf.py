"""Folders of every system in and out of transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from properties import tokens

from flame.errors import ConfigError, FlameError
from flame.models import build_model, initialize_weights
from flame.models.hf import CONFIG, class_name, export_model, load_model
from flame.models.in_transformers import register_with_transformers
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


@pytest.mark.parametrize("model_type", sorted(systems()))
def test_beams_are_decoded_from_a_cache_and_padding_is_not_seen(tmp_path, model_type):
    """Beams reorder the cache; padded rows are recomputed. Both must give what whole rows without padding give."""
    model = small(model_type, eos_token_id=None, pad_token_id=None)
    export_model(model, tmp_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, options = tokens(2, 9), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = there.generate(ids, num_beams=3, use_cache=False, **options)
    assert torch.equal(there.generate(ids, num_beams=3, **options), expected)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    padded[0, 3:5] = 0  # another length in each row
    mask = torch.ones_like(padded)
    mask[0, :5], mask[1, :3] = 0, 0
    found = there(padded, attention_mask=mask).logits
    torch.testing.assert_close(found[0, 5:], model(ids[:1, 2:]).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, 3:], model(ids[1:]).logits[0], rtol=1e-4, atol=1e-5)
    decoded = there.generate(padded, attention_mask=mask, **options)
    assert torch.equal(decoded[1:, 12:], there.generate(ids[1:], **options)[:, 9:])


def test_a_decoding_step_reads_one_token(tmp_path):
    export_model(small("gla", eos_token_id=None), tmp_path)
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    lengths = []
    there.inner.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    there.generate(tokens(1, 9), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert lengths == [9, 1, 1, 1]


def test_what_would_change_the_result_is_used_or_refused(tmp_path):
    model = small("gla")
    export_model(model, tmp_path)
    there, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens(1, 19)
    cu_seqlens = torch.tensor([0, 8, 19], dtype=torch.int32)
    assert torch.equal(there(ids, cu_seqlens=cu_seqlens).logits, model(ids, cu_seqlens=cu_seqlens).logits)
    summed = there(ids, labels=ids, num_items_in_batch=36).loss
    torch.testing.assert_close(summed * 2, there(ids, labels=ids).loss)
    assert isinstance(there(ids, return_dict=False), tuple)
    with pytest.raises(FlameError, match="position_ids is not taken"):
        there(ids, position_ids=torch.arange(19)[None])


LOAD_ALONE = """
import sys, torch, transformers
there = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(there).__name__, type(there.config).__name__)
there.save_pretrained(sys.argv[2])
again = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
ids = torch.arange(12)[None]
assert torch.equal(there(ids).logits, again(ids).logits)
"""


def test_a_folder_loads_where_nothing_was_registered_and_keeps_doing_so_when_saved(tmp_path):
    export_model(small("mamba2"), tmp_path / "exported")  # a name that transformers has a model of its own for
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", LOAD_ALONE, str(tmp_path / "exported"), str(tmp_path / "saved")]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Mamba2ForCausalLM", "Mamba2Config"]


def test_classes_are_named_as_published_checkpoints_name_them():
    names = {
        "gla": "GLA",
        "gated_deltanet": "GatedDeltaNet",
        "mesa_net": "MesaNet",
        "log_linear_mamba2": "LogLinearMamba2",
    }
    assert {model_type: class_name(model_type) for model_type in names} == names


def test_a_folder_in_bfloat16_says_so_and_loads_as_such(tmp_path):
    export_model(small("gla"), tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / CONFIG).read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_keys_that_a_config_leaves_out_take_the_defaults_of_the_system(tmp_path):
    export_model(small("gla"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**SMALL, "model_type": "gla", "num_heads": 2}))
    there, here = transformers.AutoConfig.from_pretrained(tmp_path).flame_config(), load_model(tmp_path).config
    assert there == here
