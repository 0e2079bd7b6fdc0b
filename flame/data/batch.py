"""What the loader gives and the model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from flame.data.shard import IGNORED, Row
from flame.kernels.sequence import SequenceShard, cut_sequence


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        input_ids: int64 [B, T]; with packed documents [1, B*T].
        labels: int64, same shape, the token that follows each input; -100 where there is none.
        cu_seqlens: int32 [N+1], where packed documents begin and end in the one row; None without packing.
        max_seqlen: no packed document is longer; the same for all batches of a job, so that compiled code and kernels
            that take it need not change from step to step. T without packing.
        row_numbers: place of each row in the whole run.
        source_tokens: input tokens from each source.
        shard: which part of the rows this is, where context-parallel ranks share them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    row_numbers: tuple[int, ...] = ()
    source_tokens: dict[str, int] = field(default_factory=dict)
    shard: SequenceShard | None = None

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can be asynchronous."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        return replace(
            self, input_ids=self.input_ids.pin_memory(), labels=self.labels.pin_memory(), cu_seqlens=cu_seqlens
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        cu_seqlens = None if self.cu_seqlens is None else move(self.cu_seqlens)
        shard = None if self.shard is None else self.shard.to(device, non_blocking)
        return replace(
            self, input_ids=move(self.input_ids), labels=move(self.labels), cu_seqlens=cu_seqlens, shard=shard
        )

    def part(self, group: dist.ProcessGroup) -> Batch:
        """This rank's equal, contiguous part of every row; labels, shifted before, are cut alike.

        Raises:
            FlameError: the ranks of `group` do not divide the rows.
        """
        shard, cu_seqlens = cut_sequence(group, self.input_ids.shape[1], self.cu_seqlens)
        ids, labels = (x.chunk(shard.size, 1)[shard.rank] for x in (self.input_ids, self.labels))
        return replace(self, input_ids=ids, labels=labels, cu_seqlens=cu_seqlens, shard=shard)


@dataclass(frozen=True)
class Parts:
    """This rank's part of every batch; see `Batch.part`."""

    batches: Iterable[Batch]
    group: dist.ProcessGroup

    def __iter__(self) -> Iterator[Batch]:
        return (batch.part(self.group) for batch in self.batches)


def collate(rows: Sequence[Row], source_names: Sequence[str], longest: int) -> Batch:
    """Rows to a batch, no document of which has more than `longest` tokens. Packed rows are laid end to end in one row."""
    tokens = np.stack([row.tokens for row in rows])
    labels = np.stack([row.labels for row in rows])
    counts = sum((row.source_tokens for row in rows), np.zeros(len(source_names), dtype=np.int64))
    cu_seqlens = None
    if rows[0].starts is not None:
        bounds = [row.starts + index * tokens.shape[1] for index, row in enumerate(rows) if row.starts is not None]
        ends = np.concatenate([*bounds, [tokens.size]]).astype(np.int32)
        cu_seqlens = torch.from_numpy(ends)
        tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
    return Batch(
        input_ids=torch.from_numpy(tokens).long(),
        labels=torch.from_numpy(labels).long(),
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        row_numbers=tuple(row.number for row in rows),
        source_tokens=dict(zip(source_names, (int(count) for count in counts))),
    )


def padding_row(like: Row, longest: int) -> Row:
    """A row that counts for nothing: its labels are all -100."""
    empty = np.full_like(like.labels, IGNORED)
    starts = None if like.starts is None else np.arange(0, empty.size, longest, dtype=np.int32)
    return Row(-1, np.zeros_like(like.tokens), empty, starts, np.zeros_like(like.source_tokens), {})
