"""Job files written for fla-org/flame and torchtitan 0.2."""

import pytest

from flame.config import JobConfig, load_job
from flame.config.entries import hint_of
from flame.config.old_names import CONVERTED, RENAMED, RETIRED
from flame.errors import ConfigError

MODEL_FILE = '{"model_type": "gla", "hidden_size": 64, "num_heads": 2}'

STALE = ['interval_type = "steps"', "model_weights_only = false"]

FLA_TOML = f"""\
[job]
dump_folder = "exp"
print_args = true
use_for_integration_test = false

[profiling]
enable_profiling = true
save_traces_folder = "profile_traces"
profile_freq = 512

[optimizer]
name = "AdamW"
eps = 1e-15
lr = 3e-4
early_step_in_backward = false

[lr_scheduler]
warmup_steps = 1024
decay_type = "cosine"
lr_min = 0.1

[model]
name = "fla"
config = "model.json"
tokenizer_path = "train:8192"

[training]
batch_size = 32
seq_len = 2048
gradient_accumulation_steps = 1
steps = 20480
max_norm = 1.0
skip_nan_inf = true
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
compile = false
dataset = "HuggingFaceFW/fineweb-edu"
dataset_name = "default"
num_workers = 32
pin_memory = false
persistent_workers = false
prefetch_factor = 2
seed = 42
varlen = false

[metrics]
log_freq = 32
enable_wandb = true

[experimental]
context_parallel_degree = 1
pipeline_parallel_degree = 1

[checkpoint]
enable_checkpoint = true
folder = "checkpoint"
{STALE[0]}
interval = 2048
{STALE[1]}
export_dtype = "float32"
async_mode = "disabled"

[float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false

[activation_checkpoint]
mode = "none"
selective_ac_option = "2"
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "model.json").write_text(MODEL_FILE)

    def load_text(text, *overrides):
        path = tmp_path / "fla.toml"
        path.write_text(text)
        return load_job(path, list(overrides))

    return load_text


def test_flames_published_file_tells_its_two_stale_keys(load):
    with pytest.raises(ConfigError) as error:
        load(FLA_TOML)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    for line, stale in zip(lines, STALE):
        key = stale.split()[0]
        number = FLA_TOML.splitlines().index(stale) + 1
        assert f"fla.toml:{number}: checkpoint.{key}" in line and "Remove the line" in line


def test_flames_published_file_opens_without_the_two_lines(load, caplog):
    job = load("\n".join(line for line in FLA_TOML.splitlines() if line not in STALE))
    assert job.training.local_batch_size == 32 and job.training.nan_policy == "skip"
    assert job.lr_scheduler.min_lr_factor == 0.1 and job.checkpoint.enable and job.debug.seed == 42
    assert job.training.dataloader.num_workers == 32 and job.compile.enable is False
    assert job.training.mixture()[0].subset == "default"
    notes = [record.message for record in caplog.records]
    assert len(notes) == len(set(notes))
    assert sum("training.batch_size is now training.local_batch_size" in note for note in notes) == 1
    assert any("training.skip_nan_inf is now training.nan_policy = 'skip'" in note for note in notes)
    assert any("model.name is not used" in note for note in notes)


def test_old_and_new_name_at_once_are_refused(load):
    with pytest.raises(ConfigError) as error:
        load("[training]\nbatch_size = 4\nlocal_batch_size = 4\n")
    message = str(error.value)
    assert "fla.toml:3: training.local_batch_size" in message and "fla.toml:2" in message and "Keep one" in message


def test_old_name_on_the_command_line_overrides_the_file(load):
    job = load("[training]\nlocal_batch_size = 4\n", "--training.batch_size", "2", "--training.skip_nan_inf")
    assert job.training.local_batch_size == 2 and job.training.nan_policy == "skip"


def test_old_name_with_a_wrong_value_names_its_line(load):
    with pytest.raises(ConfigError, match=r"fla.toml:2: training.local_batch_size = 'x'"):
        load('[training]\nbatch_size = "x"\n')


def test_feature_that_is_gone_is_accepted_off_and_refused_on(load):
    assert load("[quantize.grouped_mm.float8]\nfqns = []\n") == JobConfig()
    with pytest.raises(ConfigError, match=r"fla.toml:2: quantize.grouped_mm.float8.fqns = .*section \[float8\]"):
        load('[quantize.grouped_mm.float8]\nfqns = ["experts"]\n')


@pytest.mark.parametrize("name", ["float8", "quantize.linear.float8"])
def test_float8_under_the_names_of_flame_and_torchtitan(load, name):
    recipe = '[quantize.linear.float8]\nrecipe_name = "rowwise"\nenable_fsdp_float8_all_gather = true\n'
    job = load(f'[model]\nconverters = ["{name}"]\n{recipe}')
    assert job.float8.enable and job.float8.recipe_name == "rowwise"
    assert load("", f"--model.converters={name}").float8.enable
    with pytest.raises(ConfigError, match="fla.toml:2: float8.enable"):
        load('[model]\nconverters = ["mx"]\n')


def test_every_new_name_exists_and_no_old_one_does():
    for old, new in RENAMED.items():
        assert hint_of(tuple(new.split("."))) is not None, new
        assert hint_of(tuple(old.split("."))) is None, old
    for key in RETIRED:
        assert hint_of(tuple(key.split("."))) is None, key
    assert set(CONVERTED) <= set(RENAMED)
