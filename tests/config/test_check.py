"""Combinations of keys, and jobs on numbers of ranks."""

import pytest

from flame.config import JobConfig, check_parallelism, load_job
from flame.config.check import AT_LEAST, BELOW_ONE, FRACTIONS, get
from flame.errors import ConfigError


def refused(*overrides):
    with pytest.raises(ConfigError) as error:
        load_job(None, list(overrides))
    return str(error.value)


@pytest.mark.parametrize("key", [*AT_LEAST, *FRACTIONS, *BELOW_ONE, "parallelism.data_parallel_shard_degree"])
def test_numbers_out_of_range_are_refused(key):
    get(JobConfig(), key)
    assert f"{key} = -2" in refused(f"--{key}=-2")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["--training.global_batch_size=12"], ["global_batch_size = 12", "local_batch_size = 8"]),
        (
            ["--training.global_batch_size=24", "--training.gradient_accumulation_steps=2"],
            ["local_batch_size = 8 x gradient_accumulation_steps = 2"],
        ),
        (["--training.global_batch_size=0"], ["at least 1, or -1"]),
        (["--training.dataset=a", '--training.sources=[{path="b"}]'], ["keep one"]),
        (["--training.dataset=a,b", "--training.data_probs=1"], ["1 entries for 2 datasets"]),
        (["--training.dataset=a,b", "--training.data_probs=1,-1"], ["weights"]),
        (['--training.sources=[{path="b", weight=0}]'], ["training.sources", "weights"]),
        (['--training.sources=[{path="b"}]', "--training.data_dir=x"], ["into each source"]),
        (["--lr_scheduler.decay_ratio=0.5", "--training.steps=300"], ["200 warm-up steps and 150 decay steps"]),
        (["--training.nan_policy=rollback"], ["checkpoint.enable = true"]),
        (["--checkpoint.create_seed_checkpoint"], ["checkpoint.enable = true"]),
        (["--checkpoint.initial_load_in_hf"], ["initial_load_path"]),
        (
            ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path=x"]
            + ["--checkpoint.no_initial_load_model_only"],
            ["weights only"],
        ),
        (["--activation_checkpoint.selective_ac_option=ops"], ["'op'"]),
        (["--validation.enable", "--validation.holdout=0"], ["validation.dataset"]),
        (["--model.tokenizer_path=train:12"], ["train:8192"]),
        (["--model.tokenizer_path="], ["empty"]),
        (
            ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=3"],
            ["does not divide"],
        ),
    ],
)
def test_impossible_combinations_are_refused(overrides, words):
    message = refused(*overrides)
    assert all(word in message for word in words), message


def test_combination_is_told_at_the_line_that_makes_it(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[training]\nlocal_batch_size = 8\nglobal_batch_size = 12\n")
    with pytest.raises(ConfigError, match=r"job.toml:3: training.global_batch_size = 12"):
        load_job(path)


def test_packing_several_rows_tells_how_to_pack_one(caplog):
    load_job(None, ["--training.varlen", "--training.local_batch_size=32", "--training.global_batch_size=256"])
    (note,) = [record.message for record in caplog.records]
    for words in ("local_batch_size = 1", "seq_len = 65536", "global_batch_size = 8", "context_len = 2048"):
        assert words in note
    caplog.clear()
    load_job(None, ["--training.varlen", "--training.local_batch_size=1", "--training.seq_len=65536"])
    assert not caplog.records


@pytest.mark.parametrize(
    "overrides, world, accumulation, total",
    [
        ([], 4, 1, 32),
        (["--training.gradient_accumulation_steps=2"], 4, 2, 64),
        (["--training.global_batch_size=64"], 4, 2, 64),
        (["--training.global_batch_size=64", "--training.gradient_accumulation_steps=2"], 4, 2, 64),
        (["--training.global_batch_size=64", "--parallelism.tensor_parallel_degree=2"], 4, 4, 64),
        (["--parallelism.context_parallel_degree=4"], 4, 1, 8),
    ],
)
def test_global_batch_is_local_times_ranks_times_accumulation(overrides, world, accumulation, total):
    layout = check_parallelism(load_job(None, overrides), world)
    assert (layout.accumulation, layout.global_batch, layout.world_size) == (accumulation, total, world)
    assert layout.global_batch == 8 * layout.data_ranks * layout.accumulation


@pytest.mark.parametrize(
    "overrides, world, words",
    [
        (["--parallelism.tensor_parallel_degree=3"], 4, ["tensor 3 = 3 does not divide the 4 ranks"]),
        (["--parallelism.data_parallel_shard_degree=2"], 8, ["makes 2 ranks and there are 8"]),
        (["--training.global_batch_size=48"], 4, ["48", "8 x 4 data-parallel ranks = 32"]),
        (
            ["--training.global_batch_size=64", "--training.gradient_accumulation_steps=4"],
            4,
            ["disagree", "8 x 4 data-parallel ranks x 4 = 128", "accumulation is 2"],
        ),
        (["--training.virtual_shards=100"], 8, ["virtual_shards = 100", "Set it to 96"]),
        (["--parallelism.context_parallel_degree=3", "--training.virtual_shards=60"], 3, ["seq_len = 2048"]),
    ],
)
def test_jobs_that_do_not_fit_the_ranks_are_refused(overrides, world, words):
    with pytest.raises(ConfigError) as error:
        check_parallelism(load_job(None, overrides), world)
    assert all(word in str(error.value) for word in words), str(error.value)
