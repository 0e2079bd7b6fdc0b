"""`flame convert`: checkpoint step folders to Hugging Face folders and back, without a GPU, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from flame.checkpoint import storage
from flame.checkpoint.state import MODEL, OBJECTS, checkpoint_errors, is_foreign, mismatch
from flame.data.tokenizer import RUN_FOLDER, Tokenizer
from flame.errors import CheckpointError, DataError
from flame.models.decoder import CausalLM
from flame.models.hf import CONFIG, DTYPES, HEAD, files_by_name, named_weights, weights_on_meta, write_folder
from flame.models.registry import load_config

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"
READ_AT_ONCE = 256 << 20  # bytes; every reading parses the checkpoint's description anew


def stored_weights(folder: Path, at_once: int = READ_AT_ONCE) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model in a checkpoint folder, in their stored types, about `at_once` bytes at a time."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    waiting: dict[str, Tensor] = {}
    for key, entry in entries.items():
        if key.startswith(f"{MODEL}.") and isinstance(entry, TensorStorageMetadata):
            waiting[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            if sum(tensor.nbytes for tensor in waiting.values()) >= at_once:
                yield from read(waiting, folder)
                waiting = {}
    yield from read(waiting, folder)


def read(tensors: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Fill `tensors` and give them with the names that they have in the model."""
    if tensors:
        with single_process(), checkpoint_errors(f"reading {folder}"):
            dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    for key in list(tensors):
        yield key[len(MODEL) + 1 :], tensors.pop(key)


@contextmanager
def single_process() -> Iterator[None]:
    """Without torch's warning that there is no process group, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class ReadWhenWritten(dcp.DefaultSavePlanner):
    """Saves tensors that are planned on the meta device and read only at their turn to be written."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__()
        self.files = files

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        name = index.fqn[len(MODEL) + 1 :]
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def to_hf(
    step: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    config: Path | None = None,
) -> None:
    """Write the model of checkpoint folder `step` as a Hugging Face folder.

    Args:
        step: a checkpoint of flame, or with `config` one of torch's distributed checkpoint whose model is under `model.`.
        dtype: type of the weights; None keeps the stored ones.
        tokenizer: folder of the tokenizer; by default the run's own, if it has one.
        config: config.json, or a folder with one, to use instead of the one in the checkpoint.

    Raises:
        CheckpointError: `step` is no complete checkpoint.
    """
    problem = None if config and is_foreign(step) else storage.damage(step)
    if problem is not None:
        raise CheckpointError(
            f"{step} is no checkpoint to convert: {problem}. Name a step folder, .../checkpoint/step-N; for one that "
            f"another trainer wrote, name its config.json too."
        )
    weights, resolved = stored_weights(step), load_config(config or step)
    if resolved.tie_word_embeddings:
        weights = ((name, tensor) for name, tensor in weights if name != HEAD)
    write_folder(folder, resolved, weights, dtype)
    copy_tokenizer(tokenizer or tokenizer_beside(step), folder)
    name_special_tokens(folder)


def tokenizer_beside(step: Path) -> Path:
    """Where the tokenizer of a checkpoint is: in it, or, of those written before they held it, with the run."""
    return step if (step / TOKENIZER_FILES[0]).is_file() else step.parent.parent / RUN_FOLDER


def from_hf(folder: Path, root: Path, step: int = 0) -> Path:
    """Write the model of a Hugging Face folder as checkpoint `step` below `root`, in its own types.

    The result starts a run: as step 0 of the run's own checkpoints, or through checkpoint.initial_load_path. It has no
    optimizer state to resume from.

    Raises:
        CheckpointError: the folder is incomplete, or its tensors are not those of its config.json.
    """
    config = load_config(folder)
    files = files_by_name(folder)
    shapes = {f"{MODEL}.{name}": tensor for name, tensor in weights_on_meta(folder)}
    if config.tie_word_embeddings:  # some tools write the head a second time
        shapes.pop(f"{MODEL}.{HEAD}", None)
    with torch.device("meta"):
        wanted = named_weights(CausalLM(config))
    problem = mismatch(
        {f"{MODEL}.{name}": tuple(tensor.shape) for name, tensor in wanted.items()},
        {name: tuple(tensor.shape) for name, tensor in shapes.items()},
    )
    if problem:
        raise CheckpointError(f"the weights in {folder} are not those of its {CONFIG}. {problem}.")
    target = storage.begin(root, step)
    writer = dcp.FileSystemWriter(target, single_file_per_rank=False)  # it keeps all tensors of a file in memory
    with single_process(), checkpoint_errors(f"writing {target}"):
        dcp.save(shapes, storage_writer=writer, planner=ReadWhenWritten(files), no_dist=True)
    torch.save({}, target / OBJECTS)
    (target / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    copy_tokenizer(folder, target)
    storage.publish(root, step, {}, weights_only=True)
    return storage.step_folder(root, step)


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def name_special_tokens(folder: Path) -> None:
    """Have config.json name the special tokens of the tokenizer beside it, and generation_config.json too.

    A model is configured before its tokenizer is known, and generation elsewhere ends at the token named there.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    try:
        tokenizer = Tokenizer.load(folder)
    except DataError as error:
        logger.warning("%s: token ids in config.json are left as they are: %s", folder, error)
        return
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ids = {name: number for name, number in ids.items() if number is not None}
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **ids}, indent=2) + "\n")
    (folder / GENERATION_CONFIG).write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a checkpoint step folder, or a Hugging Face folder")
    parser.add_argument("target", type=Path, help="the Hugging Face folder, or the folder for checkpoints, to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of exported weights; default: as stored")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer; default: the run's own")
    parser.add_argument("--config", type=Path, help="config.json of a checkpoint that another trainer wrote")
    parser.add_argument("--step", type=int, default=0, help="step number of a written checkpoint")


def main(args: argparse.Namespace) -> int:
    """Convert in the direction that `source` calls for."""
    if (args.source / storage.MANIFEST).is_file() or is_foreign(args.source):
        to_hf(args.source, args.target, DTYPES[args.dtype] if args.dtype else None, args.tokenizer, args.config)
        print(f"wrote {args.target}")
    elif (args.source / CONFIG).is_file():
        print(f"wrote {from_hf(args.source, args.target, args.step)}")
    else:
        raise CheckpointError(
            f"{args.source} is neither a checkpoint step folder (it has no {storage.MANIFEST}) nor a Hugging Face folder "
            f"(it has no {CONFIG})."
        )
    return 0
