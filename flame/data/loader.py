"""The training loader: every rank's part of the run's rows, the same for any number of ranks and workers.

Row n of the whole run comes from virtual shard n mod V. Step s trains rows s*G .. (s+1)*G - 1, with G the global batch
in rows; rank r of W takes those with n mod W == r. W divides V, so a rank owns the shards with v mod W == r and reads
them in turn; its workers own some of these each. A row carries its shard's state, so the loader's state is that of the
rows it has handed out, however far ahead the workers are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from flame.data.ahead import Ahead
from flame.data.batch import Batch, collate
from flame.data.settings import RankSettings
from flame.data.shard import Recipe, Row, Shard
from flame.data.state import read_states, shard_key, warn_of_changes
from flame.data.workers import next_row, split_among_workers, start_streams
from flame.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


class Loader:
    """Endless micro-batches of one rank.

    Args:
        recipe: sources, tokenizer and settings of the data.
        rank: which rank of how many, its micro-batch and its workers.

    Raises:
        ConfigError: the number of virtual shards cannot be divided by the number of ranks.
    """

    def __init__(self, recipe: Recipe, rank: RankSettings) -> None:
        self._recipe = recipe
        self._rank = rank
        self._shards = owned_shards(recipe.settings.virtual_shards, rank)
        self._taken = 0  # rows handed out by this rank since the run began
        self._states: dict[int, dict[str, Any]] = {}
        self._prepared: Iterator[tuple[Batch, list[Row]]] | None = None
        used = len(split_among_workers(self._shards, rank.workers.num_workers))
        if used < rank.workers.num_workers:
            logger.warning(
                "a rank has %d virtual shards, so %d of its %d data workers stay idle; a new run can raise "
                "training.virtual_shards",
                len(self._shards), rank.workers.num_workers - used, rank.workers.num_workers,
            )  # fmt: skip

    @property
    def source_names(self) -> list[str]:
        """Labels of the sources, in the order of the job file."""
        return [source.name for source in self._recipe.sources]

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches from where the loader stands; one iterator at a time."""
        try:
            while True:
                batch, rows = self._next_prepared()
                for row in rows:
                    self._states[row.number % self._recipe.settings.virtual_shards] = row.state
                self._taken += len(rows)
                yield batch
        finally:
            if not self._rank.workers.persistent_workers:
                self.close()

    def _next_prepared(self) -> tuple[Batch, list[Row]]:
        if self._prepared is None:
            # Putting rows together and page-locking them takes milliseconds, which a thread hides behind the step.
            # Without workers it would compete with the step for the interpreter while it tokenizes.
            batches = self._prepare()
            self._prepared = Ahead(batches) if self._rank.workers.num_workers else batches
        return next(self._prepared)

    def _prepare(self) -> Iterator[tuple[Batch, list[Row]]]:
        """Batches and the rows they are made of, from where the loader stands on; touches nothing of its state."""
        ahead = self._rank.workers.prefetch_factor * self._rank.local_batch_size
        streams = start_streams(self._recipe, self._shards, dict(self._states), self._rank.workers, ahead)
        taken = self._taken
        while True:
            rows = []
            for _ in range(self._rank.local_batch_size):
                number = self._rank.dp_rank + taken * self._rank.dp_world_size
                rows.append(next_row(streams[number % self._recipe.settings.virtual_shards], number))
                taken += 1
            batch = collate(rows, self.source_names, self._recipe.settings.packing.longest)
            yield (batch.pin_memory() if self._rank.workers.pin_memory else batch), rows

    def state_dict(self) -> dict[str, Any]:
        """State of the shards this rank owns, under keys that name the shard and not the rank.

        It stands for the batches handed out so far, not for those being prepared. The union over all ranks is the state
        of the run's data; its values are numbers and short texts.
        """
        fresh = (number for number in self._shards if number not in self._states)
        states = {**self._states, **{number: Shard(self._recipe, number).state_dict() for number in fresh}}
        return {shard_key(number): states[number] for number in sorted(states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the union of the states of all ranks of a run, whatever their number was.

        Raises:
            CheckpointError: shards are missing, are cut differently, or stand at places that do not fit together.
        """
        states, total = read_states(state, self._recipe.settings.virtual_shards)
        world = self._rank.dp_world_size
        if total % world:
            raise CheckpointError(f"the data stands after row {total}, in the middle of a step of {world} ranks.")
        warn_of_changes(states[0], self._recipe)
        self.close()
        self._states = {number: states[number] for number in self._shards}
        self._taken = total // world

    def progress(self) -> dict[str, dict[str, float]]:
        """For each source, what this rank has used: `tokens`, `skipped` (malformed) documents, mean `epoch`."""
        states = list(self._states.values())
        totals = {name: {"tokens": 0.0, "skipped": 0.0, "epoch": 0.0} for name in self.source_names}
        for state in states:
            for name, entry in state["sources"].items():
                if name in totals:
                    totals[name]["tokens"] += entry["tokens"]
                    totals[name]["skipped"] += entry["skipped"]
                    totals[name]["epoch"] += entry["epoch"] / len(states)
        return totals

    def close(self) -> None:
        """Stop the worker processes. The loader can be iterated again and goes on where it stood."""
        prepared, self._prepared = self._prepared, None
        if isinstance(prepared, Ahead):
            prepared.stop()


def owned_shards(virtual_shards: int, rank: RankSettings) -> list[int]:
    """The shards of a rank, in the order in which it reads them."""
    world = rank.dp_world_size
    if virtual_shards % world:
        divisors = [str(number) for number in range(1, virtual_shards + 1) if virtual_shards % number == 0]
        larger = (virtual_shards // world + 1) * world
        raise ConfigError(
            f"training.virtual_shards is {virtual_shards} and cannot be dealt evenly to {world} data-parallel ranks. "
            f"This run can use {', '.join(divisors)} ranks; a new run on {world} can set virtual_shards = {larger}."
        )
    return list(range(rank.dp_rank, virtual_shards, world))
