"""The state of the data as a checkpoint holds it: one small entry for each virtual shard, whoever owned it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flame.errors import CheckpointError

if TYPE_CHECKING:
    from flame.data.shard import Recipe

logger = logging.getLogger(__name__)

STATE_VERSION = 1

ShardState = Mapping[str, Any]


def shard_key(number: int) -> str:
    """Name of a shard's entry."""
    return f"shard_{number:05d}"


def check_state(state: ShardState, number: int, virtual_shards: int) -> None:
    """Refuse the state of another shard, of a job with another number of shards, or of a newer format."""
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"the data state of shard {number} has version {state.get('version')}, this flame reads {STATE_VERSION}."
        )
    if state["virtual_shards"] != virtual_shards:
        raise CheckpointError(
            f"the checkpoint's data was cut into {state['virtual_shards']} virtual shards and the job asks for "
            f"{virtual_shards}; set training.virtual_shards = {state['virtual_shards']} to continue this run."
        )
    if state["shard"] != number:
        raise CheckpointError(f"the data state under shard {number} belongs to shard {state['shard']}.")


def read_states(state: Mapping[str, ShardState], shards: int) -> tuple[dict[int, dict[str, Any]], int]:
    """The states of all shards by number, and the number of rows that the run has trained.

    Raises:
        CheckpointError: shards are missing, are cut differently, or were saved at different moments.
    """
    if not state:
        raise CheckpointError("the checkpoint holds no data state.")
    check_state(next(iter(state.values())), next(iter(state.values()))["shard"], shards)
    missing = [number for number in range(shards) if shard_key(number) not in state]
    if missing:
        raise CheckpointError(
            f"the data states of {len(missing)} of {shards} virtual shards are missing, shard {missing[0]} first; the "
            "state must hold the entries of all ranks."
        )
    states = {number: dict(state[shard_key(number)]) for number in range(shards)}
    for number, entry in states.items():
        check_state(entry, number, shards)
    total = sum(entry["rows"] for entry in states.values())
    for number, entry in states.items():
        expected = -(-(total - number) // shards)
        if entry["rows"] != expected:
            raise CheckpointError(
                f"the data states are of different moments: shard {number} has made {entry['rows']} rows where "
                f"{expected} were expected after {total} rows of all shards."
            )
    return states, total


def warn_of_changes(state: ShardState, recipe: Recipe) -> None:
    """Say what is different between the data of a checkpoint (any shard's state) and that of the job."""
    saved: Mapping[str, Any] = state["sources"]
    names: Sequence[str] = [source.name for source in recipe.sources]
    for source in recipe.sources:
        if source.name not in saved:
            logger.warning("data source %r is new since the checkpoint and starts at its beginning", source.name)
        elif saved[source.name]["units"] != source.units:
            logger.warning(
                "data source %r had %d units at the checkpoint and has %d now, so the order of its documents is "
                "another: some may be read twice or late",
                *(source.name, saved[source.name]["units"], source.units),
            )
    for name in sorted(set(saved) - set(names)):
        logger.warning("data source %r of the checkpoint is not in the job any more", name)
    if state["seed"] != recipe.settings.seed:
        logger.warning("the order of the data goes on with seed %d, which the run began with", state["seed"])
