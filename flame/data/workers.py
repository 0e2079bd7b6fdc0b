"""Rows of a rank's shards, made in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from flame.data.settings import WorkerSettings
from flame.data.shard import Recipe, Row, Shard
from flame.errors import CheckpointError, DataError, FlameError

# What schedulers and terminals send to every process of a job to have it save and end (Windows has only some of them).
SCHEDULERS_SIGNALS = {
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
}


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker process, without the worker's traceback."""

    kind: type[FlameError]
    message: str


class ShardRows(IterableDataset):
    """Rows of some shards, in the order of their place in the run, from the given states on."""

    def __init__(self, recipe: Recipe, shards: Sequence[int], states: Mapping[int, Mapping[str, Any]]) -> None:
        self._recipe = recipe
        self._shards = tuple(shards)
        self._states = dict(states)

    def __iter__(self) -> Iterator[Row | Failure]:
        try:
            yield from self._rows()
        except FlameError as error:
            yield Failure(type(error), str(error))

    def _rows(self) -> Iterator[Row]:
        shards = [Shard(self._recipe, number) for number in self._shards]
        for shard in shards:
            if shard.number in self._states:
                shard.load_state_dict(self._states[shard.number])
        shards.sort(key=lambda shard: shard.next_number)
        while True:
            for shard in shards:
                row = shard.next_row()
                if row is None:
                    return
                yield row


def start_streams(
    recipe: Recipe,
    shards: Sequence[int],
    states: Mapping[int, Mapping[str, Any]],
    workers: WorkerSettings,
    rows_ahead: int,
) -> dict[int, Iterator[Row | Failure]]:
    """For each shard, the stream that its rows come from; streams are shared between shards.

    With workers, each shard belongs to one worker process, and each worker is a torch DataLoader of its own, so that
    rows can be taken from the workers in any order.

    Args:
        recipe: sources, tokenizer and settings.
        shards: the rank's shards.
        states: where each shard stands; shards without a state start at the beginning.
        workers: number of processes.
        rows_ahead: rows that each worker prepares ahead.
    """
    groups = split_among_workers(shards, workers.num_workers)
    streams: dict[int, Iterator[Row | Failure]] = {}
    for group in groups:
        rows = ShardRows(recipe, group, {number: states[number] for number in group if number in states})
        stream = iter(rows) if workers.num_workers == 0 else _start(_worker(rows, rows_ahead))
        streams.update(dict.fromkeys(group, stream))
    return streams


def split_among_workers(shards: Sequence[int], num_workers: int) -> list[list[int]]:
    """Shards of each worker; one group when there are no workers. Never more groups than shards."""
    count = max(1, min(num_workers, len(shards)))
    return [list(shards[worker::count]) for worker in range(count)]


def next_row(stream: Iterator[Row | Failure], number: int) -> Row:
    """The stream's next row, which must be the expected one; a worker's error is raised here.

    Raises:
        DataError: the data are at fault, or the worker is no more.
        CheckpointError: the states of the shards do not fit together.
    """
    try:
        row = next(stream)
    except RuntimeError as error:  # torch's word for a process that is gone
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker died ({error}). If memory ran out, lower training.dataloader.num_workers or prefetch_factor; "
            f"the same command continues from the latest checkpoint."
        ) from None
    if isinstance(row, Failure):
        raise row.kind(row.message)
    if row.number != number:
        raise CheckpointError(
            f"row {number} of the data was expected and row {row.number} came: the data states do not fit together."
        )
    return row


def _worker(rows: ShardRows, rows_ahead: int) -> DataLoader:
    return DataLoader(
        rows,
        batch_size=None,
        num_workers=1,
        collate_fn=_identity,
        prefetch_factor=max(2, rows_ahead),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader would draw a seed from the trainer's generator
    )


def _start(worker: DataLoader) -> Iterator[Row | Failure]:
    """Start the process with the scheduler's signals held back, which it inherits: one that comes before the process has
    said what it does about them waits, and does not end it."""
    if not hasattr(signal, "pthread_sigmask"):
        return iter(worker)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULERS_SIGNALS)
    try:
        return iter(worker)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _identity(row: Row | Failure) -> Row | Failure:
    return row  # as NumPy arrays, through a pipe: rows are small, and shared memory is scarce in containers


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A job that is asked to stop still needs its data until it has reached a step's end and saved. Schedulers signal
    # every process of a job, so of these signals only a termination that comes from the training process counts.
    ignored = SCHEDULERS_SIGNALS - {signal.SIGTERM}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)  # held back by `_start`
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SCHEDULERS_SIGNALS)


def _end_when_told_by(pid: int) -> None:
    """Wait for a termination signal from process `pid`, then end this process at once."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
        pass
    os._exit(0)
