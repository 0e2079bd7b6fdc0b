"""From a job to its tokenizer and loaders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flame.data.loader import Loader
from flame.data.settings import DataSettings, PackingSettings, RankSettings, SourceSettings, WorkerSettings
from flame.data.shard import Recipe
from flame.data.sources import open_source, open_sources, source_names
from flame.data.sources.base import Part
from flame.data.sources.paths import locked
from flame.data.tokenizer import RUN_FOLDER, Tokenizer
from flame.data.train_tokenizer import sample_texts
from flame.data.validation import ValidationLoader
from flame.errors import ConfigError

if TYPE_CHECKING:
    from flame.config.data import Source
    from flame.config.sections import JobConfig

TRAIN = "train:"
"""`model.tokenizer_path = "train:8192"` trains a tokenizer of that size on the job's own data."""

TRAINED = "trained_as.txt"  # beside a trained tokenizer: the value that asked for it

_TRAINING_CHARACTERS = 50_000_000  # enough for a vocabulary of tens of thousands; takes well under a minute


def open_recipe(settings: DataSettings, tokenizer: Tokenizer, *, held_out: bool = False) -> Recipe:
    """Open the sources: their training part, or their held-out part.

    Raises:
        DataError: a source is missing, empty or malformed, or the tokenizer lacks a token that packing needs.
    """
    if settings.packing.add_bos:
        tokenizer.require_bos()
    if settings.packing.add_eos:
        tokenizer.require_eos()
    part = Part(settings.holdout, held_out)
    sources = open_sources(settings.sources, settings.virtual_shards, part, tokenizer.fingerprint)
    return Recipe(settings, tuple(sources), tokenizer)


def build_loader(job: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int) -> Loader:
    """The training loader of one data-parallel rank.

    Raises:
        ConfigError: the batch or the virtual shards cannot be divided among the ranks.
        DataError: a source is missing, empty or malformed.
    """
    rank = RankSettings(dp_rank, dp_world_size, microbatch_rows(job), _workers(job))
    _check_divides(job, dp_world_size)
    return Loader(open_recipe(data_settings(job), tokenizer), rank)


def build_validation_loader(
    job: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int
) -> ValidationLoader | None:
    """The validation loader of one data-parallel rank; None when validation is off.

    It gives `validation.steps` global batches: the same rows for every number of ranks, as long as the global batch is.
    """
    section = job.validation
    if not section.enable:
        return None
    settings = data_settings(job)
    packing = replace(settings.packing, seq_len=section.seq_len or settings.packing.seq_len)
    own = section.mixture()
    if own:
        settings = replace(settings, sources=_sources(own), packing=packing, holdout=0.0)
    else:
        settings = replace(settings, packing=packing)
    batch = section.local_batch_size or job.training.local_batch_size
    rank = RankSettings(dp_rank, dp_world_size, batch, _workers(job))
    rows = None if section.steps < 0 else section.steps * global_batch_size(job, dp_world_size)
    return ValidationLoader(open_recipe(settings, tokenizer, held_out=not own), rank, rows)


def load_tokenizer(job: JobConfig) -> Tokenizer:
    """The job's tokenizer. `train:<size>` trains it once and keeps it in `<job.dump_folder>/tokenizer`.

    Every process may call this at the same time: the first one trains, the others wait and read.
    """
    path = job.model.tokenizer_path
    if not path.startswith(TRAIN):
        return Tokenizer.load(path)
    size = path[len(TRAIN) :]
    if not size.isdigit():
        raise ConfigError(
            f"model.tokenizer_path is {path!r}; after 'train:' comes the number of tokens, as train:8192."
        )
    folder = Path(job.job.dump_folder) / RUN_FOLDER
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name("tokenizer.lock")):
        if not folder.exists():
            _train_to(folder, data_settings(job), int(size))
    trained = folder / TRAINED
    if trained.is_file() and trained.read_text() != path:
        raise ConfigError(
            f"model.tokenizer_path = {path!r}, and {folder} was trained as {trained.read_text()!r} for the checkpoints beside "
            f"it. Go back to that, or name another job.dump_folder."
        )
    return Tokenizer.load(folder)


def data_settings(job: JobConfig) -> DataSettings:
    """The part of a job that decides what is read, in which order, and how it is packed."""
    training, validation = job.training, job.validation
    shares_data = validation.enable and not validation.mixture()
    return DataSettings(
        sources=_sources(training.mixture()),
        packing=PackingSettings(
            training.seq_len, training.varlen, training.context_len, training.add_bos, training.add_eos
        ),
        virtual_shards=training.virtual_shards,
        seed=job.debug.seed,
        shuffle=training.shuffle,
        on_malformed=training.on_malformed,
        holdout=validation.holdout if shares_data else 0.0,
    )


def microbatch_rows(job: JobConfig) -> int:
    """Rows of a micro-batch: of one forward and backward, or of what travels through a pipeline together."""
    section = job.parallelism
    if section.pipeline_parallel_degree > 1:
        return section.pipeline_parallel_microbatch_size
    return job.training.local_batch_size


def global_batch_size(job: JobConfig, dp_world_size: int) -> int:
    """Rows of a training step over all ranks."""
    training = job.training
    if training.global_batch_size > 0:
        return training.global_batch_size
    return training.local_batch_size * dp_world_size * (training.gradient_accumulation_steps or 1)


def _sources(entries: Iterable[Source]) -> tuple[SourceSettings, ...]:
    names = [entry.name for entry in fields(SourceSettings)]
    return tuple(SourceSettings(**{name: getattr(entry, name) for name in names}) for entry in entries)


def _workers(job: JobConfig) -> WorkerSettings:
    section = job.training.dataloader
    return WorkerSettings(
        section.num_workers,
        section.prefetch_factor,
        section.pin_memory and torch.cuda.is_available(),
        section.persistent_workers,
    )


def _check_divides(job: JobConfig, dp_world_size: int) -> None:
    rows, micro = global_batch_size(job, dp_world_size), job.training.local_batch_size * dp_world_size
    if rows % micro:
        raise ConfigError(
            f"training.global_batch_size is {rows}, which is no multiple of local_batch_size x data-parallel ranks = "
            f"{job.training.local_batch_size} x {dp_world_size} = {micro}."
        )


def _train_to(folder: Path, settings: DataSettings, size: int) -> None:
    """Train on an equal sample of every source, and let the folder appear when it is complete."""
    names = source_names(settings.sources)
    sources = [open_source(entry, name, settings.virtual_shards) for entry, name in zip(settings.sources, names)]
    texts = (text for source in sources for text in sample_texts(source, _TRAINING_CHARACTERS // len(sources)))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    Tokenizer.train(texts, size).save(temporary)
    (temporary / TRAINED).write_text(f"{TRAIN}{size}")
    os.replace(temporary, folder)
