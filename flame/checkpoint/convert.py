"""`flame convert`: checkpoint step folders to Hugging Face folders and back, without a GPU, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame.checkpoint import storage
from flame.checkpoint.state import MODEL, OBJECTS
from flame.errors import CheckpointError
from flame.models.hf import CONFIG, DTYPES, read_weights, write_folder
from flame.models.registry import load_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FOLDER = "tokenizer"  # where a run keeps the tokenizer it trains with


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model in a checkpoint folder, one at a time, in their stored types."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, entry in entries.items():
        if key.startswith(f"{MODEL}.") and isinstance(entry, TensorStorageMetadata):
            tensor = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
            dcp.load(tensor, checkpoint_id=folder, no_dist=True)
            yield key[len(MODEL) + 1 :], tensor[key]


def to_hf(step: Path, folder: Path, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> None:
    """Write the model of checkpoint folder `step` as a Hugging Face folder.

    Args:
        dtype: type of the weights; None keeps the stored ones.
        tokenizer: folder of the tokenizer; by default the run's own, if it has one.

    Raises:
        CheckpointError: `step` is no complete checkpoint.
    """
    problem = storage.damage(step) if step.is_dir() else "there is no such folder"
    if problem is not None:
        raise CheckpointError(
            f"{step} is no checkpoint to convert: {problem}. Name a step folder, .../checkpoint/step-N."
        )
    write_folder(folder, load_config(step), stored_weights(step), dtype)
    copy_tokenizer(tokenizer or step.parent.parent / TOKENIZER_FOLDER, folder)


def from_hf(folder: Path, root: Path, step: int = 0) -> Path:
    """Write the model of a Hugging Face folder as checkpoint `step` below `root`, in its own types.

    The result starts a run through checkpoint.initial_load_path; it has no optimizer state to resume from.
    """
    config = load_config(folder)
    tensors = {f"{MODEL}.{name}": tensor for name, tensor in read_weights(folder)}
    target = storage.begin(root, step)
    dcp.save(tensors, checkpoint_id=target, no_dist=True)
    torch.save({}, target / OBJECTS)
    (target / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    copy_tokenizer(folder, target)
    storage.publish(root, step, target)
    return storage.step_folder(root, step)


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a checkpoint step folder, or a Hugging Face folder")
    parser.add_argument("target", type=Path, help="the Hugging Face folder, or the folder for checkpoints, to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of exported weights; default: as stored")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer; default: the run's own")
    parser.add_argument("--step", type=int, default=0, help="step number of a written checkpoint")


def main(args: argparse.Namespace) -> int:
    """Convert in the direction that `source` calls for."""
    if (args.source / storage.MANIFEST).is_file():
        to_hf(args.source, args.target, DTYPES[args.dtype] if args.dtype else None, args.tokenizer)
        print(f"wrote {args.target}")
    elif (args.source / CONFIG).is_file():
        print(f"wrote {from_hf(args.source, args.target, args.step)}")
    else:
        raise CheckpointError(
            f"{args.source} is neither a checkpoint step folder (it has no {storage.MANIFEST}) nor a Hugging Face folder "
            f"(it has no {CONFIG})."
        )
    return 0
