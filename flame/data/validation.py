"""The validation loader: the same rows at every evaluation and on every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flame.data.batch import Batch, collate, padding_row
from flame.data.settings import RankSettings
from flame.data.shard import Recipe, Row, Shard
from flame.errors import DataError

_SEED = 0  # not the job's: runs with other seeds are compared on the same rows


class ValidationLoader:
    """The first `rows` rows of the validation data, read once in an order that never changes.

    Every rank makes all rows once, keeps its own in memory (row n is rank n mod W's) and gives them again at each
    evaluation. All ranks give the same number of batches; rows that fill them up have labels of -100 only.

    Args:
        recipe: sources (restricted to the held-out part, or validation sources), tokenizer and settings; the number of
            virtual shards and the seed are not used.
        rank: which rank of how many, and its micro-batch.
        rows: number of rows of the whole run's validation; None for all of the data. Less when the data ends first.
    """

    def __init__(self, recipe: Recipe, rank: RankSettings, rows: int | None) -> None:
        self._recipe = validation_recipe(recipe)
        self._rank = rank
        self._rows = rows
        self._batches: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = self._make_batches()
        return iter(self._batches)

    def __len__(self) -> int:
        """Number of batches of each rank; reads the data when this is the first use."""
        if self._batches is None:
            self._batches = self._make_batches()
        return len(self._batches)

    def _make_batches(self) -> list[Batch]:
        names = [source.name for source in self._recipe.sources]
        mine, total, sample = self._read_rows()
        if sample is None:
            raise DataError(f"the validation data ({', '.join(names)}) holds no document.")
        longest = self._recipe.settings.packing.longest
        world, size = self._rank.dp_world_size, self._rank.local_batch_size
        count = -(-total // (world * size))
        mine += [padding_row(sample, longest)] * (count * size - len(mine))
        batches = [collate(mine[start : start + size], names, longest) for start in range(0, len(mine), size)]
        return [batch.pin_memory() for batch in batches] if self._rank.workers.pin_memory else batches

    def _read_rows(self) -> tuple[list[Row], int, Row | None]:
        """This rank's rows, the number of all rows, and any one row."""
        shard = Shard(self._recipe, 0)
        mine: list[Row] = []
        total, sample = 0, None
        while self._rows is None or total < self._rows:
            row = shard.next_row()
            if row is None:
                break
            sample = row
            if total % self._rank.dp_world_size == self._rank.dp_rank:
                mine.append(row)
            total += 1
        return mine, total, sample


def validation_recipe(recipe: Recipe) -> Recipe:
    """The recipe as one shard, read once, in the order of a fixed seed."""
    settings = replace(recipe.settings, virtual_shards=1, seed=_SEED)
    return replace(recipe, settings=settings, epochs=1)
