"""Reading job files and command-line settings."""

import logging

import pytest

from flame.config import JobConfig, load_job, model_values
from flame.config.sections import Source
from flame.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="job.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def problems(path, *overrides):
    with pytest.raises(ConfigError) as error:
        load_job(path, list(overrides))
    return str(error.value)


def test_no_file_and_no_settings_give_the_defaults():
    assert load_job(None) == JobConfig()


def test_file_sets_keys_and_leaves_the_rest_at_defaults(write):
    job = load_job(write("[training]\nsteps = 7\n[training.dataloader]\nnum_workers = 0\n[optimizer]\nlr = 1\n"))
    assert job.training.steps == 7 and job.training.dataloader.num_workers == 0
    assert job.optimizer.lr == 1.0 and isinstance(job.optimizer.lr, float)
    assert job.training.seq_len == JobConfig().training.seq_len


@pytest.mark.parametrize(
    "arguments, section, key, value",
    [
        (["--training.steps", "12"], "training", "steps", 12),
        (["--training.steps=12"], "training", "steps", 12),
        (["--training.seq-len", "64"], "training", "seq_len", 64),
        (["--training.global_batch_size", "-1"], "training", "global_batch_size", -1),
        (["--optimizer.lr", "3e-4"], "optimizer", "lr", 3e-4),
        (["--checkpoint.enable"], "checkpoint", "enable", True),
        (["--checkpoint.enable", "--training.steps", "3"], "checkpoint", "enable", True),
        (["--checkpoint.enable", "false"], "checkpoint", "enable", False),
        (["--job.no_print_config"], "job", "print_config", False),
        (["--job.no-print-args"], "job", "print_config", False),
        (["--compile.enable", "auto"], "compile", "enable", "auto"),
        (["--compile.enable"], "compile", "enable", True),
        (["--job.description", "true"], "job", "description", "true"),
        (["--job.description="], "job", "description", ""),
        (["--training.dataset", "a,b"], "training", "dataset", ["a", "b"]),
        (["--training.dataset", "none"], "training", "dataset", None),
        (["--training.data_probs", "0.25, 0.75", "--training.dataset=a,b"], "training", "data_probs", [0.25, 0.75]),
        (["--generation.prompts", '["one, two", "three"]'], "generation", "prompts", ["one, two", "three"]),
        (["--checkpoint.interval_minutes", "5"], "checkpoint", "interval_minutes", 5.0),
        (["--training.sources", '[{path = "x", weight = 2}]'], "training", "sources", [Source("x", weight=2.0)]),
        (["--training.steps", "1", "--training.steps", "2"], "training", "steps", 2),
        (["--activation_checkpoint.selective_ac_option", "2"], "activation_checkpoint", "selective_ac_option", "2"),
    ],
)
def test_command_line_sets_one_key(arguments, section, key, value):
    assert getattr(getattr(load_job(None, arguments), section), key) == value


def test_command_line_wins_over_the_file(write):
    assert load_job(write("[training]\nsteps = 7\n"), ["--training.steps", "8"]).training.steps == 8


def test_model_keys_stay_a_dictionary_and_can_be_overridden_deeply(write):
    text = '[model]\nmodel_type = "gla"\nhidden_size = 64\nnum_heads = 2\n[model.attn]\nlayers = [1]\nnum_heads = 2\n'
    job = load_job(
        write(text), ["--model.hidden_size", "128", "--model.attn.num_heads", "4", "--model.hidden_act=silu"]
    )
    assert job.model.keys == {
        "model_type": "gla",
        "hidden_size": 128,
        "num_heads": 2,
        "attn": {"layers": [1], "num_heads": 4},
        "hidden_act": "silu",
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("\n[training]\nstps = 3\n", ["job.toml:3:", "'stps'", "did you mean steps?"]),
        ("[trainning]\nsteps = 3\n", ["job.toml:2:", "[trainning]", "did you mean [training]?"]),
        ('[training]\nsteps = "3"\n', ["job.toml:2:", "training.steps = '3'", "whole number"]),
        ("[training]\nsteps = true\n", ["job.toml:2:", "whole number"]),
        ("[training]\nsteps = 1.5\n", ["job.toml:2:", "whole number"]),
        ('[training]\nnan_policy = "panic"\n', ["job.toml:2:", "'skip', 'rollback', 'stop'"]),
        ("[optimizer]\nsteps = 3\n", ["job.toml:2:", "did you mean training.steps?"]),
        ("[training.dataloader]\nworkers = 3\n", ["job.toml:2:", "[training.dataloader]", "num_workers"]),
        ("[training.loader]\nnum_workers = 3\n", ["job.toml:2:", "[training.loader]"]),
        ("training = 3\n", ["job.toml:1:", "[training]"]),
        (
            '[training]\n[[training.sources]]\npath = "a"\n[[training.sources]]\npath = "b"\nwieght = 1\n',
            [":4:", "weight"],
        ),
        ("[model]\nkeys = {hidden_size = 3}\n", ["job.toml:2:", "keys"]),
    ],
)
def test_wrong_settings_are_refused_with_line_and_advice(write, text, words):
    message = problems(write(text))
    assert all(word in message for word in words), message


def test_all_wrong_keys_are_told_at_once(write):
    message = problems(write("[training]\nstps = 3\nseq_len = false\n"), "--optimizer.rl", "3")
    assert len(message.splitlines()) == 3
    assert "job.toml:2:" in message and "job.toml:3:" in message and "command line: unknown key 'rl'" in message


def test_wrong_model_key_is_refused_with_its_line(write):
    message = problems(write('[model]\nmodel_type = "gla"\nhidden_size = 64\nnum_head = 2\n'))
    assert "job.toml:4:" in message and "'num_head'; did you mean 'num_heads'" in message
    message = problems(write('[model]\nmodel_type = "glaa"\n'))
    assert "job.toml:2:" in message and "did you mean 'gla'" in message


def test_what_is_no_setting_is_refused():
    assert "'--steps' is no setting" in problems(None, "--steps", "3")


def test_missing_file_and_bad_toml_are_told(write, tmp_path):
    assert "cannot be read" in problems(tmp_path / "none.toml")
    assert "line 1" in problems(write("[training\n"))


def test_model_file_may_lie_beside_the_job(write, tmp_path, monkeypatch):
    write('{"model_type": "gla", "hidden_size": 64, "num_heads": 2}', "model.json")
    job = load_job(write('[model]\nconfig = "model.json"\nnum_hidden_layers = 2\n'))
    assert job.model.config == str(tmp_path / "model.json")
    message = problems(write('[model]\nconfig = "other.json"\n'))
    assert "job.toml:2:" in message and "no such file" in message


def test_comma_lists_of_old_files_open(write):
    text = '[training]\ndataset = "a,b"\ndataset_name = "x,"\ndata_probs = "0.6,0.4"\nstreaming = true\n'
    first, second = load_job(write(text)).training.mixture()
    assert (first.path, first.subset, first.weight, first.split) == ("a", "x", 0.6, "train")
    assert (second.path, second.subset, second.weight, second.streaming) == ("b", None, 0.4, True)


def test_default_data_need_no_download():
    assert [source.path for source in JobConfig().training.mixture()] == ["stdlib"]
    assert JobConfig().validation.mixture() == []


def test_notes_are_logged_once_by_the_first_rank_only(write, caplog, monkeypatch):
    path = write("[training]\nbatch_size = 4\n")
    with caplog.at_level(logging.WARNING):
        load_job(path)
    assert [record.message for record in caplog.records] == [
        f"{path}:2: training.batch_size is now training.local_batch_size."
    ]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_job(path)
    assert not caplog.records


def test_other_data_on_the_command_line_drop_what_the_file_says_about_its_own(write, caplog):
    path = write('[training]\ndataset = "hub/set"\ndataset_name = "sample"\nstreaming = true\ndata_probs = "1"\n')
    job = load_job(path, ["--training.dataset", "/data/*.jsonl"])
    assert job.training.mixture() == [Source(path="/data/*.jsonl", streaming=True)]
    assert "training.dataset_name, training.data_probs no longer apply" in caplog.text
    job = load_job(path, ["--training.dataset", "hub/set", "--training.dataset_name", "other"])
    assert job.training.mixture()[0].subset == "other"
    assert load_job(path, ["--training.dataset_split", "test"]).training.mixture()[0].subset == "sample"


def test_other_data_on_the_command_line_replace_tables_of_sources(write):
    path = write('[[training.sources]]\npath = "a"\nweight = 2\n[validation]\nenable = true\ndataset = "b"\n')
    job = load_job(path, ["--training.dataset", "c,d"])
    assert [source.path for source in job.training.mixture()] == ["c", "d"]
    assert job.validation.dataset == ["b"]


def test_none_takes_a_key_of_the_model_away(write):
    path = write(
        '[model]\nmodel_type = "gla"\nvocab_size = 32000\nattn = {layers = [1], num_heads = 2, window_size = 8}\n'
    )
    job = load_job(
        path, ["--model.vocab_size", "none", "--model.attn.window_size", "none", "--model.num_hidden_layers=2"]
    )
    assert model_values(job)["vocab_size"] == 320 and job.model.keys["attn"] == {"layers": [1], "num_heads": 2}
    assert "takes a key of the job file away" in problems(path, "--model.hidden_size", "none")
