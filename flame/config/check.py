"""What the types of single keys cannot say: ranges, combinations, and whether a job fits a number of ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flame.config.data import Training, Validation
from flame.config.sections import JobConfig
from flame.errors import ConfigError

Problem = tuple[str, str]
"""Dotted key (for the place in the file), and the message."""

AT_LEAST = {
    "training.local_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.seq_len": 1,
    "training.context_len": 1,
    "training.steps": 1,
    "training.max_norm": 0,
    "training.max_skipped_steps": 0,
    "training.gc_freq": 1,
    "training.virtual_shards": 1,
    "training.dataloader.num_workers": 0,
    "training.dataloader.prefetch_factor": 1,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.tensor_parallel_degree": 1,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "parallelism.pipeline_parallel_stages_per_rank": 1,
    "parallelism.context_parallel_degree": 1,
    "optimizer.lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "lr_scheduler.warmup_steps": 0,
    "lr_scheduler.total_steps": 1,
    "checkpoint.interval": 0,
    "checkpoint.interval_minutes": 0,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "metrics.log_freq": 1,
    "profiling.profile_freq": 1,
    "profiling.profiler_active": 1,
    "profiling.profiler_warmup": 0,
    "validation.freq": 1,
    "validation.steps": -1,
    "validation.local_batch_size": 1,
    "validation.seq_len": 1,
    "generation.freq": 0,
    "generation.max_new_tokens": 1,
    "generation.temperature": 0,
    "debug.seed": 0,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
}

# Closed below, and above: 1 itself is allowed for the fractions only.
FRACTIONS = ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2", "optimizer.momentum", "validation.holdout")


def get(job: JobConfig, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = job
    for part in key.split("."):
        value = getattr(value, part)
    return value


def find_problems(job: JobConfig) -> Iterator[Problem]:
    """All that is impossible about `job` whatever the number of ranks."""
    yield from _range_problems(job)
    yield from _batch_problems(job)
    yield from _source_problems("training", job.training)
    yield from _source_problems("validation", job.validation)
    yield from _schedule_problems(job)
    yield from _checkpoint_problems(job)
    yield from _other_problems(job)


def find_notes(job: JobConfig) -> Iterator[Problem]:
    """What is allowed and seldom meant."""
    training = job.training
    if training.varlen and training.local_batch_size > 1:
        batch, length = training.local_batch_size, training.seq_len
        yield (
            "training.varlen",
            f"documents are packed into {batch} rows of seq_len = {length} tokens and cut at the end of each. To cut fewer, "
            f"take the same tokens as one row: local_batch_size = 1, seq_len = {batch * length}"
            + (f", global_batch_size = {training.global_batch_size // batch}" if training.global_batch_size > 0 else "")
            + f", and context_len = {training.context_len or length} for the longest piece of a document.",
        )
    if training.context_len is not None and not training.varlen:
        yield "training.context_len", "it applies under training.varlen only and is not used."


def _range_problems(job: JobConfig) -> Iterator[Problem]:
    for key, least in AT_LEAST.items():
        value = get(job, key)
        if value is not None and not least <= value < math.inf:
            yield key, f"{key} = {value} must be at least {least}."
    for key in FRACTIONS:
        value = get(job, key)
        if value is not None and not 0 <= value <= 1:
            yield key, f"{key} = {value} must lie between 0 and 1."
    for key in BELOW_ONE:
        if not 0 <= get(job, key) < 1:
            yield key, f"{key} = {get(job, key)} must be at least 0 and less than 1."
    if job.parallelism.data_parallel_shard_degree < 1 and job.parallelism.data_parallel_shard_degree != -1:
        value = job.parallelism.data_parallel_shard_degree
        yield (
            "parallelism.data_parallel_shard_degree",
            f"parallelism.data_parallel_shard_degree = {value} must be at least 1, or -1 for all remaining ranks.",
        )


def _batch_problems(job: JobConfig) -> Iterator[Problem]:
    training = job.training
    total, local = training.global_batch_size, training.local_batch_size
    if total == -1:
        return
    if total < 1:
        yield "training.global_batch_size", f"training.global_batch_size = {total} must be at least 1, or -1."
        return
    each = local * (training.gradient_accumulation_steps or 1)
    if total % each:
        parts = f"local_batch_size = {local}"
        if training.gradient_accumulation_steps is not None:
            parts += f" x gradient_accumulation_steps = {training.gradient_accumulation_steps}"
        yield (
            "training.global_batch_size",
            f"training.global_batch_size = {total} is no multiple of {parts}. Leave one of them out to have it follow.",
        )


def _source_problems(section: str, settings: Training | Validation) -> Iterator[Problem]:
    if settings.sources and settings.dataset:
        yield f"{section}.dataset", f"{section}.dataset and [[{section}.sources]] both name the data; keep one."
    count = len(settings.dataset or ["stdlib"])
    for key in ("dataset_name", "dataset_split", "data_dir", "data_files", "data_probs"):
        entries = getattr(settings, key, None)
        if entries is None or (key == "data_files" and count == 1):
            continue
        if settings.sources:
            yield (
                f"{section}.{key}",
                f"{section}.{key} belongs to {section}.dataset; write it into each source instead.",
            )
        elif len(entries) != count:
            yield (
                f"{section}.{key}",
                f"{section}.{key} has {len(entries)} entries for {count} datasets. Give one for each, in their order; "
                f"an entry may be empty.",
            )
    weights = [source.weight for source in settings.sources] or getattr(settings, "data_probs", None) or [1.0]
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) <= 0:
        key = f"{section}.sources" if settings.sources else f"{section}.data_probs"
        yield key, f"{key}: the weights {weights} must be numbers of at least 0, and one of them more."


def _schedule_problems(job: JobConfig) -> Iterator[Problem]:
    schedule = job.lr_scheduler
    if schedule.decay_ratio is None or not 0 <= schedule.decay_ratio <= 1:
        return
    total = schedule.total_steps or job.training.steps
    decay = round(total * schedule.decay_ratio)
    if schedule.warmup_steps + decay > total:
        yield (
            "lr_scheduler.warmup_steps",
            f"lr_scheduler: {schedule.warmup_steps} warm-up steps and {decay} decay steps (decay_ratio = "
            f"{schedule.decay_ratio}) do not fit into {total} steps. Lower warmup_steps or decay_ratio.",
        )


def _checkpoint_problems(job: JobConfig) -> Iterator[Problem]:
    checkpoint = job.checkpoint
    for key, wanted in (
        ("training.nan_policy", job.training.nan_policy == "rollback"),
        ("checkpoint.create_seed_checkpoint", checkpoint.create_seed_checkpoint),
    ):
        if wanted and not checkpoint.enable:
            yield key, f"{key} = {get(job, key)!r} needs checkpoints; set checkpoint.enable = true."
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path is None:
        yield "checkpoint.initial_load_in_hf", "checkpoint.initial_load_in_hf needs checkpoint.initial_load_path."
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        yield (
            "checkpoint.initial_load_model_only",
            "a Hugging Face folder holds weights only; set checkpoint.initial_load_model_only = true.",
        )


def _other_problems(job: JobConfig) -> Iterator[Problem]:
    option = job.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) > 0):
        key = "activation_checkpoint.selective_ac_option"
        yield key, f"{key} = {option!r} is not accepted; it takes 'op' or a number of blocks, at least 1."
    if job.compile.cuda_graph and job.training.varlen:
        yield (
            "compile.cuda_graph",
            "compile.cuda_graph needs rows of one shape and training.varlen packs documents of any number into them; "
            "set one of the two to false.",
        )
    validation = job.validation
    if validation.enable and not validation.mixture() and validation.holdout == 0:
        yield "validation.holdout", "validation needs data: give validation.dataset, or a validation.holdout above 0."
    tokenizer = job.model.tokenizer_path
    if tokenizer.startswith("train:") and trained_vocabulary(tokenizer) is None:
        yield (
            "model.tokenizer_path",
            f"model.tokenizer_path = {tokenizer!r} is not accepted; write train:8192 for 8192 tokens, at least 300.",
        )
    if not tokenizer:
        yield "model.tokenizer_path", "model.tokenizer_path is empty; name a tokenizer, or write bytes or train:8192."
    micro, local = job.parallelism.pipeline_parallel_microbatch_size, job.training.local_batch_size
    if job.parallelism.pipeline_parallel_degree > 1 and micro > 0 and local % micro:
        yield (
            "parallelism.pipeline_parallel_microbatch_size",
            f"parallelism.pipeline_parallel_microbatch_size = {micro} does not divide training.local_batch_size = {local}.",
        )


def trained_vocabulary(tokenizer_path: str) -> int | None:
    """N of ``train:N``; None for everything else, and for fewer tokens than bytes and special tokens need."""
    match = re.fullmatch(r"train:(\d+)", tokenizer_path)
    return int(match[1]) if match and int(match[1]) >= 300 else None


@dataclass(frozen=True)
class Layout:
    """How a job lies on its ranks.

    Attributes:
        pp, dp_replicate, dp_shard, cp, tp: degrees; their product is the number of ranks.
        accumulation: micro-batches per step and rank.
        global_batch: sequences per step over all ranks.
    """

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    accumulation: int
    global_batch: int

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard


def check_parallelism(job: JobConfig, world_size: int) -> Layout:
    """The layout of `job` on `world_size` ranks.

    Raises:
        ConfigError: degrees, batch, sequence or virtual shards do not fit that number of ranks.
    """
    section, training = job.parallelism, job.training
    pp, cp, tp = section.pipeline_parallel_degree, section.context_parallel_degree, section.tensor_parallel_degree
    replicate, shard = section.data_parallel_replicate_degree, section.data_parallel_shard_degree
    others = pp * replicate * cp * tp
    named = f"pipeline {pp} x replicate {replicate} x context {cp} x tensor {tp}"
    if shard == -1:
        if world_size % others:
            raise ConfigError(
                f"[parallelism]: {named} = {others} does not divide the {world_size} ranks. Start a multiple of {others} "
                f"processes, or change a degree."
            )
        shard = world_size // others
    if others * shard != world_size:
        raise ConfigError(
            f"[parallelism]: {named} x shard {shard} makes {others * shard} ranks and there are {world_size}. Set "
            f"data_parallel_shard_degree = -1 for all that is left, or start {others * shard} processes."
        )
    if training.seq_len % cp:
        raise ConfigError(
            f"training.seq_len = {training.seq_len} is no multiple of parallelism.context_parallel_degree = {cp}."
        )
    data_ranks = replicate * shard
    if training.virtual_shards % data_ranks:
        multiple = data_ranks * max(1, training.virtual_shards // data_ranks)
        raise ConfigError(
            f"training.virtual_shards = {training.virtual_shards} is no multiple of the {data_ranks} data-parallel ranks. "
            f"Set it to {multiple} for a new run; a run that has started keeps its number and takes its divisors as ranks."
        )
    accumulation, total = resolve_batch(training, data_ranks)
    return Layout(pp, replicate, shard, cp, tp, accumulation, total)


def resolve_batch(training: Training, data_ranks: int) -> tuple[int, int]:
    """Micro-batches per step and rank, and sequences per step over all ranks.

    Raises:
        ConfigError: local_batch_size, global_batch_size and gradient_accumulation_steps contradict each other.
    """
    local, given, total = training.local_batch_size, training.gradient_accumulation_steps, training.global_batch_size
    together = local * data_ranks
    if total == -1:
        accumulation = given or 1
        return accumulation, together * accumulation
    product = f"local_batch_size {local} x {data_ranks} data-parallel ranks"
    if total % together:
        raise ConfigError(
            f"training.global_batch_size = {total} is no multiple of {product} = {together}. Change one of them."
        )
    if given is not None and together * given != total:
        raise ConfigError(
            f"training.global_batch_size = {total} and training.gradient_accumulation_steps = {given} disagree: {product} "
            f"x {given} = {together * given}. Leave one of them out; with this global batch, accumulation is "
            f"{total // together}."
        )
    return total // together, total
