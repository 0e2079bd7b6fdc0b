"""What a checkpoint holds: tensors, which torch's distributed checkpoint shards, and everything else, in one file.

Tensors go under ``<part>.<name>``. The rest of every rank's states (cursors of data shards, step, random generators) is
gathered and merged, so that what is stored does not depend on which rank stored it and any number of ranks can load it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame.checkpoint import storage
from flame.checkpoint.staging import FromHost, Staged
from flame.errors import CheckpointError
from flame.models.hf import HEAD, named_weights

OBJECTS = "state.pt"
DCP_METADATA = ".metadata"
MODEL = "model"
_LISTED = 8  # names that an error text lists before it counts


class Stateful(Protocol):
    """A part of the training state.

    Tensors in its `state_dict` must be the live ones: they are saved from there and loaded in place. `load_state_dict`
    gets the rest back, merged over the ranks that saved it, and is not called for a part that holds tensors only.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested mappings; lists and all else are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def tensors_of(part: str, state: Stateful | nn.Module) -> dict[str, Tensor]:
    """The tensors of one part under their names in the checkpoint."""
    if isinstance(state, nn.Module):
        return {f"{part}.{name}": tensor for name, tensor in named_weights(state).items()}
    return {f"{part}.{name}": value for name, value in flatten(state.state_dict()) if isinstance(value, Tensor)}


def objects_of(state: Stateful | nn.Module) -> dict[str, Any]:
    """What of one part is no tensor, nested as the part gave it."""
    return {} if isinstance(state, nn.Module) else without_tensors(state.state_dict())


def without_tensors(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` less its tensors and less the mappings that held nothing else."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            inner = without_tensors(value)
            if inner or not value:
                kept[key] = inner
        elif not isinstance(value, Tensor):
            kept[key] = value
    return kept


def gather_objects(states: Mapping[str, Stateful | nn.Module], group: dist.ProcessGroup) -> dict[str, Any]:
    """Objects of all parts, merged over ranks; where ranks disagree the lowest wins. Complete on rank 0 only."""
    own = {part: objects_of(state) for part, state in states.items()}
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(own, gathered if dist.get_rank(group) == 0 else None, dst=0, group=group)
    merged: dict[str, Any] = {}
    for entry in gathered:
        for part, objects in (entry or {}).items():
            merged[part] = {**objects, **merged.get(part, {})}
    return merged


def gather_from_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's `value`, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def agree(problem: str, group: dist.ProcessGroup) -> str:
    """Every rank's problem in one text, the same on all ranks; empty when none has any."""
    problems = gather_from_all(problem, group)
    named = [(f"rank {rank}: " if len(problems) > 1 else "") + text for rank, text in enumerate(problems) if text]
    return "; ".join(dict.fromkeys(named))


def write_tensors(tensors: Mapping[str, Tensor] | Staged, folder: Path, group: dist.ProcessGroup) -> None:
    """Write every rank's shards, from the tensors themselves or from their copies.

    Raises:
        CheckpointError: any rank failed, on all ranks.
    """
    with checkpoint_errors(f"writing {folder}"):
        if not isinstance(tensors, Staged):
            dcp.save(dict(tensors), checkpoint_id=folder, process_group=group)
            return
        if tensors.copied is not None:
            tensors.copied.synchronize()
        dcp.save(dict(tensors.tensors), checkpoint_id=folder, planner=FromHost(tensors), process_group=group)


def read_tensors(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Fill `tensors` in place, whatever the layout they were saved under."""
    with checkpoint_errors(f"reading {folder}"):
        dcp.load(tensors, checkpoint_id=folder, process_group=group)


@contextmanager
def checkpoint_errors(doing: str) -> Iterator[None]:
    """torch's error as ours. Its own is a BaseException, which `except Exception` lets through."""
    try:
        yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise CheckpointError(f"{doing} failed: {causes}.") from None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint folder."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def shapes_on_all_ranks(tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that any rank holds; ranks hold different ones when layers are split over them."""
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    digests = gather_from_all(zlib.crc32(repr(own).encode()), group)
    if len(set(digests)) == 1:
        return own
    return {name: shape for shapes in gather_from_all(own, group) for name, shape in shapes.items()}


def check_fits(wanted: Mapping[str, tuple[int, ...]], folder: Path, differences: Callable[[], str]) -> None:
    """Refuse a checkpoint whose tensors are not those wanted.

    Args:
        wanted: shapes by name, of all ranks.
        differences: text on how the checkpoint's model differs from this one; asked for only in an error.
    """
    stored = stored_shapes(folder)
    parts = {name.split(".")[0] for name in wanted}
    stored = {name: shape for name, shape in stored.items() if name.split(".")[0] in parts}
    if f"{MODEL}.{HEAD}" not in wanted:  # tied to the embedding; some trainers save it a second time
        stored.pop(f"{MODEL}.{HEAD}", None)
    problem = mismatch(wanted, stored)
    if not problem:
        return
    wrong = {name.split(".")[0] for name in {*wanted, *stored} if wanted.get(name) != stored.get(name)}
    if MODEL in wrong:
        what, advice = "model", "Use another job.dump_folder, or the [model] of that run."
    else:
        what = "optimizer"
        advice = f"To start {' and '.join(sorted(wrong))} afresh: checkpoint.exclude_from_loading = {sorted(wrong)}."
    raise CheckpointError(f"checkpoint {folder} is of another {what}. {problem}.{differences()} {advice}")


def mismatch(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> str:
    """How the tensors of a checkpoint differ from those wanted, by name and shape; empty when they do not."""
    reshaped = [
        f"{name} is {list(stored[name])} there and {list(shape)} here"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    problems = [
        ("not in the checkpoint", [name for name in wanted if name not in stored]),
        ("not in this run", [name for name in stored if name not in wanted]),
        ("of another shape", reshaped),
    ]
    return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems if names)


def listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def is_foreign(folder: Path) -> bool:
    """Whether it was written by torch's distributed checkpoint in another trainer, which describes nothing else."""
    return (folder / DCP_METADATA).is_file() and not (folder / storage.MANIFEST).is_file()


def load_objects(folder: Path) -> dict[str, Any]:
    """The merged objects of a checkpoint of ours. They are pickled: load checkpoints only from where you trust."""
    return torch.load(folder / OBJECTS, map_location="cpu", weights_only=False)
