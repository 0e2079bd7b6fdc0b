"""What the loader needs to know of a job. `flame.data.build` makes these from a job file; tests make them directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flame.errors import ConfigError

SOURCE_KINDS = ("auto", "stdlib", "text", "jsonl", "parquet", "pretokenized", "huggingface")
MALFORMED_POLICIES = ("error", "skip")


@dataclass(frozen=True)
class SourceSettings:
    """One data source of a mixture.

    Args:
        path: `stdlib`, a file, a folder (all its Parquet files, else JSONL, else text), a glob, or a Hugging Face
            dataset (name, or local folder).
        name: label in metrics and checkpoints; made from the path when empty.
        weight: share of the mixture, in tokens, relative to the other sources.
        kind: one of `SOURCE_KINDS`; `auto` decides by the path.
        text_key: field (JSONL) or column (Parquet, Hugging Face) that holds the text.
        lines: plain text only: every line is a document, otherwise every file is.
        subset, split, data_dir, data_files: passed to `datasets.load_dataset`.
        streaming: read a Hugging Face dataset as a stream instead of preparing it on disk first.
    """

    path: str
    name: str = ""
    weight: float = 1.0
    kind: str = "auto"
    text_key: str = "text"
    lines: bool = False
    subset: str | None = None
    split: str = "train"
    data_dir: str | None = None
    data_files: str | Sequence[str] | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("a data source has no path; give a file, folder, glob, dataset name or 'stdlib'.")
        if self.kind not in SOURCE_KINDS:
            raise ConfigError(f"data source {self.path!r}: kind is {self.kind!r}, expected one of {SOURCE_KINDS}.")
        if not self.weight >= 0:
            raise ConfigError(f"data source {self.path!r}: weight is {self.weight}, expected a number >= 0.")


@dataclass(frozen=True)
class PackingSettings:
    """How documents become rows.

    `varlen=False`: rows of `seq_len` tokens cut from the concatenation of documents. The label of the last token of
    a row is the first token of the next one, so that every token is an input once and a label once.
    `varlen=True`: the same rows plus `cu_seqlens`; no piece is longer than `context_len`. The last token of a document
    has label -100; where a document is cut, the last token of the piece still predicts the true next token.
    """

    seq_len: int
    varlen: bool = False
    context_len: int | None = None
    add_bos: bool = False
    add_eos: bool = True

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ConfigError(f"training.seq_len is {self.seq_len}, expected at least 1.")
        if self.context_len is not None and self.context_len < 1:
            raise ConfigError(f"training.context_len is {self.context_len}, expected at least 1.")

    @property
    def longest(self) -> int:
        """No document in a row is longer than this many tokens."""
        return min(self.context_len or self.seq_len, self.seq_len) if self.varlen else self.seq_len


@dataclass(frozen=True)
class DataSettings:
    """Everything that decides the content and order of the training data, and nothing about ranks or workers."""

    sources: tuple[SourceSettings, ...]
    packing: PackingSettings
    virtual_shards: int = 64
    seed: int = 42
    shuffle: bool = True
    on_malformed: str = "error"
    holdout: float = 0.0
    """Share of documents, chosen by hash, that training never reads and validation does."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no data source is given; name one, for example training.dataset = 'stdlib'.")
        if self.virtual_shards < 1:
            raise ConfigError(f"training.virtual_shards is {self.virtual_shards}, expected at least 1.")
        if self.on_malformed not in MALFORMED_POLICIES:
            raise ConfigError(f"on_malformed is {self.on_malformed!r}, expected one of {MALFORMED_POLICIES}.")
        if not 0.0 <= self.holdout < 1.0:
            raise ConfigError(f"the held-out share is {self.holdout}, expected 0 <= share < 1.")
        if sum(source.weight for source in self.sources) <= 0:
            raise ConfigError("all data sources have weight 0; give at least one a positive weight.")


@dataclass(frozen=True)
class WorkerSettings:
    """Worker processes of one rank. None of these changes what is read, only how fast."""

    num_workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool = False
    persistent_workers: bool = True


@dataclass(frozen=True)
class RankSettings:
    """Which part of every global batch this rank reads, and in what pieces."""

    dp_rank: int = 0
    dp_world_size: int = 1
    local_batch_size: int = 1
    workers: WorkerSettings = field(default_factory=WorkerSettings)
