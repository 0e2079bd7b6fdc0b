"""Jobs written as TOML and read back."""

import dataclasses

from flame.config import JobConfig, load_job, to_toml
from flame.config.sections import Source
from flame.schema import type_hints


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if value >= 1 else 0.5 if isinstance(value, float) else 1
    return value


def test_defaults_round_trip(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(to_toml(JobConfig()))
    assert load_job(path) == JobConfig()


def test_awkward_values_round_trip_exactly(tmp_path):
    job = JobConfig()
    job.job.description = 'tab\t "quotes" back\\slash \x7f \u00e9 \U0001f600\nline'
    job.job.dump_folder = "'single' # not a comment"
    job.model.keys = {
        "model_type": "gla",
        "hidden_size": 64,
        "num_heads": 2,
        "norm_eps": 1e-5,
        "attn": {"layers": [1, 3], "num_heads": 2, "rope_theta": 1e16},
    }
    job.training.sources = [Source("a,b", weight=1 / 3), Source("c", data_files=["x", ""], subset="s", lines=True)]
    job.training.gradient_accumulation_steps = 2
    job.optimizer.eps = 1e-15
    job.compile.enable = False
    job.generation.prompts = ["def f(", "", "a, b"]
    job.lr_scheduler.decay_ratio = 0.1
    path = tmp_path / "job.toml"
    path.write_text(to_toml(job), encoding="utf-8")
    assert load_job(path) == job


def test_every_plain_key_round_trips_away_from_its_default(tmp_path):
    job = JobConfig()
    skip = {
        "pipeline_parallel_microbatch_size",
        "global_batch_size",
        "data_parallel_shard_degree",
        "load_step",
        "steps",
        "beta1",
        "create_seed_checkpoint",
        "cuda_graph",
    }
    for section in dataclasses.fields(job):
        table = getattr(job, section.name)
        for item in dataclasses.fields(table):
            if item.name not in skip:
                setattr(table, item.name, changed(getattr(table, item.name)))
    job.checkpoint.initial_load_path, job.checkpoint.initial_load_model_only = "somewhere", True
    job.training.max_norm = 0.1 + 0.2
    path = tmp_path / "job.toml"
    path.write_text(to_toml(job))
    assert load_job(path) == job


def test_absent_is_the_only_default_of_what_may_be_absent():
    # None cannot be written; a key that allows it must therefore mean it when left out.
    for section, cls in type_hints(JobConfig).items():
        for item in dataclasses.fields(cls):
            if type(None) in getattr(type_hints(cls)[item.name], "__args__", ()):
                assert item.default is None, f"{section}.{item.name}"
