"""Loaders and tokenizers from a job."""

import multiprocessing

import pytest
import torch
from corpus import mixture, rows_of, take, texts, write_jsonl

from flame.config.data import Source
from flame.config.sections import JobConfig
from flame.data import Tokenizer, build_loader, build_validation_loader, load_tokenizer
from flame.data.build import data_settings
from flame.errors import ConfigError, DataError

TOKENIZER = Tokenizer.byte_level()


def job_of(tmp_path, **training) -> JobConfig:
    job = JobConfig()
    job.job.dump_folder = str(tmp_path / "run")
    settings = {"seq_len": 32, "local_batch_size": 2, "virtual_shards": 12, **training}
    for name, value in settings.items():
        setattr(job.training, name, value)
    job.training.dataloader.num_workers = 0
    job.validation.seq_len = None
    return job


def files(tmp_path) -> list[str]:
    return [entry.path for entry in mixture(tmp_path)]


def test_defaults_read_the_standard_library():
    job = JobConfig()
    job.training.dataloader.num_workers = 0
    (batch,) = take(build_loader(job, TOKENIZER, 0, 1), 1)
    assert batch.input_ids.shape == (job.training.local_batch_size, job.training.seq_len)
    assert list(batch.source_tokens) == ["stdlib"]


def test_flat_keys_and_source_tables_mean_the_same(tmp_path):
    paths = files(tmp_path)
    flat = job_of(tmp_path, dataset=paths, data_probs=[0.75, 0.25])
    tables = job_of(tmp_path, sources=[Source(paths[0], weight=0.75), Source(paths[1], weight=0.25)])
    assert data_settings(flat) == data_settings(tables)
    one, other = (take(build_loader(job, TOKENIZER, 0, 1), 3) for job in (flat, tables))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, other))


@pytest.mark.parametrize("spelling", ["files", "builder", "folder"])
def test_data_files_as_users_of_datasets_write_them(tmp_path, spelling):
    write_jsonl(tmp_path / "a.jsonl", texts("a", 5))
    write_jsonl(tmp_path / "other.jsonl", texts("b", 5))
    dataset, pattern = {
        "files": (str(tmp_path / "a.jsonl"), None),
        "builder": ("json", [str(tmp_path / "a*.jsonl")]),
        "folder": (str(tmp_path), ["a.jsonl"]),
    }[spelling]
    loader = build_loader(job_of(tmp_path, dataset=[dataset], data_files=pattern), TOKENIZER, 0, 1)
    assert loader._recipe.sources[0].units == 5


def test_a_folder_of_parquet_with_a_readme_is_parquet(tmp_path):
    from test_sources import write_parquet

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("about")
    write_parquet(tmp_path / "set" / "a.parquet", texts("p", 5))
    loader = build_loader(job_of(tmp_path, dataset=[str(tmp_path / "set")]), TOKENIZER, 0, 1)
    assert type(loader._recipe.sources[0]).__name__ == "ParquetFiles"


def test_validation_evaluates_the_global_batch_on_every_layout(tmp_path):
    def rows(world):
        job = job_of(tmp_path, dataset=files(tmp_path), global_batch_size=12)
        job.validation.enable, job.validation.holdout, job.validation.steps = True, 0.4, 2
        loaders = [build_validation_loader(job, TOKENIZER, rank, world) for rank in range(world)]
        return sorted(row for loader in loaders for batch in loader for row in rows_of(batch, 32) if row[0] >= 0)

    one = rows(1)
    assert len(one) == 24
    assert rows(2) == rows(3) == one


def test_validation_data_of_its_own_leaves_the_training_data_whole(tmp_path):
    job = job_of(tmp_path, dataset=files(tmp_path)[:1])
    job.validation.enable = True
    job.validation.dataset = files(tmp_path)[1:]
    job.validation.seq_len = 16
    assert build_loader(job, TOKENIZER, 0, 1)._recipe.sources[0].units == 23
    (batch, *_) = build_validation_loader(job, TOKENIZER, 0, 1)
    assert list(batch.source_tokens) == ["b.jsonl"]
    assert batch.input_ids.shape == (2, 16)
    job.validation.dataset = None
    job.validation.holdout = 0.4
    assert build_loader(job, TOKENIZER, 0, 1)._recipe.sources[0].units < 23


def test_no_validation_loader_unless_enabled(tmp_path):
    assert build_validation_loader(job_of(tmp_path), TOKENIZER, 0, 1) is None


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no multiple of local_batch_size x data-parallel ranks = 2 x 4 = 8"):
        build_loader(job_of(tmp_path, global_batch_size=12), TOKENIZER, 0, 4)


def test_an_empty_path_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no path"):
        build_loader(job_of(tmp_path, sources=[Source(path="")]), TOKENIZER, 0, 1)


def _train(job, queue):
    queue.put(load_tokenizer(job).fingerprint)


def test_a_tokenizer_is_trained_once_on_the_jobs_data_by_all_ranks_at_once(tmp_path):
    job = job_of(tmp_path, dataset=files(tmp_path))
    job.model.tokenizer_path = "train:270"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_train, args=(job, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    prints = {queue.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert prints == {load_tokenizer(job).fingerprint}
    assert load_tokenizer(job).vocab_size == 270
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_tokenizer_trained_to_another_size_is_not_taken_for_the_one_asked_for(tmp_path):
    job = job_of(tmp_path, dataset=files(tmp_path))
    job.model.tokenizer_path = "train:270"
    load_tokenizer(job)
    job.model.tokenizer_path = "train:280"
    with pytest.raises(ConfigError, match="was trained as 'train:270'"):
        load_tokenizer(job)


def test_tokenizer_paths_that_cannot_be(tmp_path):
    job = job_of(tmp_path)
    job.model.tokenizer_path = "train:many"
    with pytest.raises(ConfigError, match="train:8192"):
        load_tokenizer(job)
    job.model.tokenizer_path = str(tmp_path / "none")
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(job)
