"""Sections about data and batches: [training], [[training.sources]], [training.dataloader], [validation]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# float16 is left out: without loss scaling its gradients underflow.
Precision = Literal["bfloat16", "float32"]


@dataclass
class Dataloader:
    """How batches are produced. Nothing here changes their content."""

    num_workers: int = 2
    """Processes that read and tokenize, per rank; 0 does it in the training process."""

    prefetch_factor: int = 2
    """Micro-batches that each worker prepares ahead."""

    pin_memory: bool = True
    """Hand batches to the GPU through pinned memory. Without a GPU it does nothing."""

    persistent_workers: bool = True
    """Keep the worker processes when the data starts over."""


@dataclass
class Source:
    """One entry of a mixture, written as a [[training.sources]] table."""

    path: str
    """`stdlib` (the source text of Python's standard library, always present), a file, a folder, a glob, or a Hugging
    Face dataset."""

    name: str = ""
    """Label in metrics and checkpoints; made from the path when empty."""

    weight: float = 1.0
    """Share of the training tokens, relative to the other sources."""

    kind: Literal["auto", "stdlib", "text", "jsonl", "parquet", "pretokenized", "huggingface"] = "auto"
    """What the path holds; `auto` decides by the path."""

    text_key: str = "text"
    """Field or column with the text (JSONL, Parquet, Hugging Face)."""

    lines: bool = False
    """Plain text: each line is a document. Otherwise each file is."""

    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    data_dir: str | None = None
    """`data_dir` of a Hugging Face dataset."""

    data_files: list[str] | None = None
    """`data_files` of a Hugging Face dataset."""

    streaming: bool = False
    """Read a Hugging Face dataset as a stream instead of preparing it on disk first."""


@dataclass
class Training:
    """Batch, length, precision and data."""

    local_batch_size: int = 8
    """Sequences per data-parallel rank and micro-batch. With `varlen` they are laid end to end in one row of
    local_batch_size x seq_len tokens; 1, with a long seq_len, cuts the fewest documents."""

    global_batch_size: int = -1
    """Sequences per step over all ranks; -1 means local_batch_size x data-parallel ranks x
    gradient_accumulation_steps."""

    gradient_accumulation_steps: int | None = None
    """Micro-batches per step and rank. Absent, it follows from global_batch_size, or is 1."""

    seq_len: int = 2048
    """Tokens per sequence; with `varlen`, the length into which documents are packed."""

    varlen: bool = False
    """Pack documents so that they do not see each other: no attention, state or convolution crosses a document's
    start."""

    context_len: int | None = None
    """Longest piece of a document under `varlen`; longer documents are cut. Absent, pieces may fill the row."""

    steps: int = 10000
    """Optimizer steps of the whole run."""

    max_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""

    nan_policy: Literal["skip", "rollback", "stop"] = "stop"
    """After a loss or gradient that is not finite: `skip` drops the update, `rollback` returns to the last checkpoint
    and leaves that step's data out, `stop` ends the run with the weights from before."""

    max_skipped_steps: int = 20
    """Under `skip`, this many dropped updates in a row end the run; 0 allows any number."""

    gc_freq: int = 50
    """Steps between Python garbage collections, which are otherwise off while training so that ranks pause together."""

    mixed_precision_param: Precision = "bfloat16"
    """Dtype of gathered parameters and of the computation. The sharded parameters themselves are float32."""

    mixed_precision_reduce: Precision = "float32"
    """Dtype in which gradients are summed over ranks and micro-batches."""

    enable_cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory."""

    dataset: list[str] | None = None
    """Path or Hugging Face name; several, separated by commas, make a mixture. Absent, and without `sources`, it is
    `stdlib`. See `path` of [[training.sources]]."""

    dataset_name: list[str] | None = None
    """Configuration names of the datasets, in their order; an empty one stands for none."""

    dataset_split: list[str] | None = None
    """Splits of the datasets, in their order; `train` where absent or empty."""

    data_dir: list[str] | None = None
    """`data_dir` of the datasets, in their order; an empty one stands for none."""

    data_files: list[str] | None = None
    """`data_files` of the datasets, in their order; an empty one stands for none. With one dataset, all of them are its
    own."""

    data_probs: list[float] | None = None
    """Shares of the datasets in the training tokens, in their order; equal where absent."""

    text_key: str = "text"
    """Field or column with the text, for all of `dataset`."""

    streaming: bool = False
    """Read Hugging Face datasets as streams instead of preparing them on disk first."""

    sources: list[Source] = field(default_factory=list)
    """Mixture as [[training.sources]] tables, instead of the flat keys above."""

    virtual_shards: int = 64
    """Parts into which the data is cut whatever the number of ranks and workers, so that a run resumes exactly on
    another number of them. A
    multiple of the number of data-parallel ranks."""

    shuffle: bool = True
    """Read documents in a pseudo-random order that follows from debug.seed."""

    on_malformed: Literal["error", "skip"] = "error"
    """What a record that cannot be read does: end the run, or be counted and passed over."""

    add_bos: bool = False
    """Put the tokenizer's bos token before each document."""

    add_eos: bool = True
    """Put the tokenizer's eos token after each document."""

    dataloader: Dataloader = field(default_factory=Dataloader)
    """See [training.dataloader]."""

    def mixture(self) -> list[Source]:
        """The sources to read: `sources`, or what the flat keys describe, whose lengths agree once checked."""
        return self.sources or flat_mixture(self)


@dataclass
class Validation:
    """Loss on held-out data, at the start, every `freq` steps, and at the end."""

    enable: bool = False
    """Validate."""

    freq: int = 500
    """Steps between validations."""

    steps: int = 16
    """Global batches per validation, so that every number of ranks sees the same sequences; -1 takes all of the data."""

    dataset: list[str] | None = None
    """Data to validate on, as training.dataset. Absent, it is a part of the training data that training then never
    reads."""

    dataset_name: list[str] | None = None
    """Configuration names of the validation datasets, in their order."""

    dataset_split: list[str] | None = None
    """Splits of the validation datasets, in their order."""

    sources: list[Source] = field(default_factory=list)
    """Validation data as [[validation.sources]] tables, instead of the flat keys."""

    holdout: float = 0.01
    """Without data of its own: share of the training documents kept for validation, chosen by hash."""

    local_batch_size: int | None = None
    """Sequences per rank and batch; absent, it is training.local_batch_size."""

    seq_len: int | None = None
    """Tokens per sequence; absent, it is training.seq_len."""

    def mixture(self) -> list[Source]:
        """The sources to validate on; none for the held-out part of the training data."""
        return self.sources or (flat_mixture(self) if self.dataset else [])


def flat_mixture(section: Training | Validation) -> list[Source]:
    """Sources from the flat, comma-separated keys of a section."""
    paths = section.dataset or ["stdlib"]
    columns: dict[str, Any] = {"subset": section.dataset_name, "split": section.dataset_split}
    if isinstance(section, Training):
        columns |= {"weight": section.data_probs, "data_dir": section.data_dir}
    sources = []
    for index, path in enumerate(paths):
        # An empty entry of a column leaves the default of that one source alone.
        given = {key: column[index] for key, column in columns.items() if column and column[index] != ""}
        sources.append(Source(path=path, **given))
        if isinstance(section, Training):
            sources[-1].text_key, sources[-1].streaming = section.text_key, section.streaming
            sources[-1].data_files = data_files_of(section.data_files or [], index, len(paths))
    return sources


def data_files_of(files: list[str], index: int, count: int) -> list[str] | None:
    """The entries of training.data_files that belong to one dataset: all of them when it is the only one."""
    own = files if count == 1 else files[index : index + 1]
    return [name for name in own if name] or None
