import argparse
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from properties import tokens
from safetensors.torch import save_file

from flame.checkpoint import convert
from flame.checkpoint.convert import from_hf, stored_weights, to_hf
from flame.data.tokenizer import Tokenizer
from flame.errors import CheckpointError
from flame.evaluation.generate import find_tokenizer
from flame.models import build_model, initialize_weights
from flame.models.hf import FolderWriter, export_model, load_model, read_weights

CONFIG = {
    "model_type": "gla", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2,
    "attn": {"layers": [1], "num_heads": 4},
}  # fmt: skip


def exported(folder, dtype=None, **extra):
    model = build_model({**CONFIG, **extra})
    initialize_weights(model, 3)
    export_model(model, folder, dtype)
    (folder / "tokenizer.json").write_text("{}")
    return model.eval()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_to_checkpoint_and_back_is_byte_equal(tmp_path, dtype, tied):
    model = exported(tmp_path / "hf", dtype, tie_word_embeddings=tied)
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    to_hf(step, tmp_path / "again", tokenizer=tmp_path / "hf")
    before, after = dict(read_weights(tmp_path / "hf")), dict(read_weights(tmp_path / "again"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in before) is not tied
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    ids = tokens(2, 19)
    assert torch.equal(load_model(tmp_path / "hf")(ids).logits, load_model(tmp_path / "again")(ids).logits)
    if dtype is None:
        assert torch.equal(load_model(tmp_path / "again")(ids).logits, model(ids).logits)
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == ("bfloat16" if dtype else "float32")


def test_large_folders_are_cut_into_indexed_shards(tmp_path):
    tensors = {f"layer.{i}": torch.full((64,), float(i)) for i in range(5)}
    writer = FolderWriter(tmp_path, shard_bytes=600)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors"))[0] == "model-00001-of-00003.safetensors"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_weights(tmp_path))
    assert len(dict(read_weights(tmp_path))) == 5


def test_weights_of_another_shape_are_named(tmp_path):
    exported(tmp_path)
    from flame.models.hf import load_weights

    with pytest.raises(CheckpointError, match="weight is"):
        load_weights(build_model({**CONFIG, "vocab_size": 98}), tmp_path)


def test_a_head_written_twice_by_other_tools_is_dropped_when_tied(tmp_path):
    model = exported(tmp_path / "hf", tie_word_embeddings=True)
    tensors = {**dict(read_weights(tmp_path / "hf")), "lm_head.weight": model.lm_head.weight.detach().clone()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert "lm_head.weight" not in dict(stored_weights(step))
    assert torch.equal(load_model(tmp_path / "hf").lm_head.weight, model.lm_head.weight)


def test_weights_that_are_not_those_of_the_config_are_refused_with_their_names(tmp_path):
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: model.model.layers.2"):
        from_hf(tmp_path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_tensors_are_read_in_pieces_of_the_size_asked_for(tmp_path):
    exported(tmp_path / "hf")
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    whole, pieces = dict(stored_weights(step)), dict(stored_weights(step, at_once=2000))
    assert list(whole) == list(pieces) and all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_exports_name_the_special_tokens_of_their_tokenizer(tmp_path):
    exported(tmp_path / "hf")
    Tokenizer.byte_level().save(tmp_path / "hf")
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    to_hf(step, tmp_path / "out")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "out" / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (256, 257)


def test_a_checkpoint_copied_out_of_its_run_keeps_its_tokenizer(tmp_path):
    exported(tmp_path / "hf")
    Tokenizer.train(["some text of its own"] * 9, 270).save(tmp_path / "hf")
    step = from_hf(tmp_path / "hf", tmp_path / "run" / "checkpoint")
    alone = shutil.copytree(step, tmp_path / "alone")
    to_hf(alone, tmp_path / "out")
    assert find_tokenizer(alone, None).fingerprint == Tokenizer.load(tmp_path / "out").fingerprint
    assert Tokenizer.load(tmp_path / "out").vocab_size == Tokenizer.load(tmp_path / "hf").vocab_size


def test_a_checkpoint_of_another_trainer_converts_given_its_config(tmp_path, capsys, monkeypatch):
    model = exported(tmp_path / "hf", tie_word_embeddings=True)
    run = tmp_path / "run"
    state = {"model": model.state_dict(), "train_state": {"step": 7}}  # its head written twice
    dcp.save(state, checkpoint_id=run / "checkpoint" / "step-7", no_dist=True)
    script = Path(convert.__file__).parents[2] / "scripts" / "convert_dcp_to_hf.py"
    call = [str(script), "--path", str(run), "--step", "7"]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit, match="name its config.json"):
        runpy.run_path(str(script), run_name="__main__")
    monkeypatch.setattr(sys, "argv", [*call, "--config", str(tmp_path / "hf"), "--tokenizer", str(tmp_path / "hf")])
    runpy.run_path(str(script), run_name="__main__")
    ids = tokens(2, 19)
    assert torch.equal(load_model(run)(ids).logits, model(ids).logits)
    assert (run / "tokenizer.json").is_file()


def test_the_scripts_lead_from_a_folder_to_a_checkpoint_and_back(tmp_path, capsys, monkeypatch):
    exported(tmp_path / "hf")
    scripts = Path(convert.__file__).parents[2] / "scripts"
    for script, arguments in (
        ("convert_hf_to_dcp.py", ["--model", tmp_path / "hf", "--checkpoint", tmp_path / "run" / "checkpoint"]),
        ("convert_dcp_to_hf.py", ["--path", tmp_path / "run", "--step", 0]),
    ):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(scripts / script), run_name="__main__")
    before, after = dict(read_weights(tmp_path / "hf")), dict(read_weights(tmp_path / "run"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_command_converts_in_both_directions(tmp_path, capsys):
    exported(tmp_path / "hf")
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    convert.main(parser.parse_args([str(tmp_path / "hf"), str(tmp_path / "run" / "checkpoint"), "--step", "7"]))
    step = tmp_path / "run" / "checkpoint" / "step-7"
    convert.main(parser.parse_args([str(step), str(tmp_path / "out"), "--dtype", "bfloat16"]))
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in read_weights(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="neither"):
        convert.main(parser.parse_args([str(tmp_path), str(tmp_path / "x")]))
