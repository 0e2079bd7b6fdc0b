"""Hugging Face folders: sharded safetensors, config.json, tokenizer. transformers itself is needed only to load them there.

Tensor names are the same on both sides, so a folder is written and read tensor by tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.errors import CheckpointError
from flame.models.config import ModelConfig
from flame.models.decoder import CausalLM
from flame.models.initialize import local_slice
from flame.models.registry import load_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD = "lm_head.weight"
SHARD_BYTES = 4 << 30


# Names of systems in class names where they are not their words, capitalized, as published checkpoints have them.
SPELLINGS = {
    "abc": "ABC", "delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet", "gated_deltaproduct": "GatedDeltaProduct",
    "gla": "GLA", "gsa": "GSA", "hgrn": "HGRN", "hgrn2": "HGRN2", "kda": "KDA", "lightnet": "LightNet",
    "linear_attn": "LinearAttention", "log_linear_gated_deltanet": "LogLinearGatedDeltaNet", "mla": "MLA", "moba": "MoBA",
    "nsa": "NSA", "path_attn": "PaTHAttention", "rebased": "ReBased", "retnet": "RetNet", "rwkv6": "RWKV6",
    "rwkv7": "RWKV7",
}  # fmt: skip
REMOTE_CODE = "modeling_flame"
TEMPLATE = '''"""{name} for transformers, by trust_remote_code=True; the model itself is in the package flame."""

try:
    from flame.models.in_transformers import transformers_classes
except ImportError as error:
    raise ImportError(
        "this model needs flame: install it from a checkout with `pip install -e .`, or put the checkout on PYTHONPATH."
    ) from error

{name}Config, {name}ForCausalLM = transformers_classes("{model_type}")
'''


def class_name(model_type: str) -> str:
    """What the classes of a system begin with in transformers."""
    return SPELLINGS.get(model_type, "".join(word.capitalize() for word in model_type.split("_")))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; of tied ones only the first name, as safetensors wants it."""
    kept, seen, weights = model.state_dict().keys(), set(), {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in kept and id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach()
    return weights


class FolderWriter:
    """Writes tensors into safetensors files of limited size as they come; `close` writes the index.

    Args:
        dtype: type of floating-point tensors on disk; None keeps each one's own.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self.waiting: dict[str, Tensor] = {}
        self.bytes = 0
        self.sizes: Counter[torch.dtype] = Counter()  # bytes by type
        self.shards: list[list[str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
            stale.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        size = tensor.numel() * tensor.element_size()
        if self.waiting and self.bytes + size > self.shard_bytes:
            self.write_shard()
        self.waiting[name] = tensor.cpu().contiguous()
        self.bytes += size
        self.sizes[tensor.dtype] += size

    def write_shard(self) -> None:
        save_file(self.waiting, self.part(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.waiting))
        self.waiting, self.bytes = {}, 0

    def part(self, number: int) -> Path:
        """Name of a shard while the number of shards is not known."""
        return self.folder / f"model-part{number:05d}.safetensors"

    def close(self) -> None:
        self.write_shard()
        count = len(self.shards)
        if count == 1:
            self.part(0).rename(self.folder / WEIGHTS)
            return
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            self.part(number).rename(self.folder / name)
        weight_map = {tensor: name for name, tensors in zip(names, self.shards) for tensor in tensors}
        index = {"metadata": {"total_size": self.sizes.total()}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))


def write_config(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """config.json as transformers and `build_model` read it."""
    values = {**config.to_dict(), "architectures": [f"{class_name(config.model_type)}ForCausalLM"]}
    values["dtype"] = str(dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    add_remote_code(folder)


def add_remote_code(folder: Path) -> None:
    """Have a folder load by `from_pretrained(folder, trust_remote_code=True)` wherever flame can be imported."""
    values = json.loads((folder / CONFIG).read_text())
    name = class_name(values["model_type"])
    suffixes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
    values["auto_map"] = {auto: f"{REMOTE_CODE}.{name}{suffix}" for auto, suffix in suffixes.items()}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    code = TEMPLATE.format(name=name, model_type=values["model_type"])
    (folder / f"{REMOTE_CODE}.py").write_text(code)


def write_folder(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> None:
    """Write config.json and weights; `dtype` None keeps the tensors' own."""
    writer = FolderWriter(folder, dtype)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.close()
    (common, _), *_ = writer.sizes.most_common(1)
    write_config(folder, config, common)


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor), one at a time; all ranks must go through it together."""
    for name, tensor in named_weights(model).items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model in training, sharded or not; all ranks must call it, rank 0 writes, one full tensor at a time."""
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    gathered = model.full_weights() if hasattr(model, "full_weights") else full_weights(model)
    if is_writer:
        write_folder(folder, model.config, gathered, dtype)
    else:
        for _ in gathered:
            pass


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those of its index or its only one.

    Raises:
        CheckpointError: there are none, or the index names a missing one.
    """
    index = folder / INDEX
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no complete Hugging Face folder: {missing[0]} is missing.")
    return [folder / name for name in names]


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a folder, one tensor in memory at a time."""
    for file in weight_files(folder):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, shard.get_tensor(name)


def files_by_name(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a folder."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as shard:
            found.update(dict.fromkeys(shard.keys(), file))
    return found


def weights_on_meta(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor without memory) of a folder: shapes and types."""
    for name, tensor in read_weights(folder):  # files are mapped, so that only what is looked at is read
        yield name, tensor.to("meta")


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, from a Hugging Face folder.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    load_tensors(model, read_weights(folder), folder)


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: Path) -> None:
    """Fill a model, sharded or not, from full tensors by name; every rank keeps its own part of each.

    Args:
        where: what the tensors come from, for messages.
    """
    targets = named_weights(model)
    missing = set(targets)
    for name, tensor in tensors:
        target = targets.get(name)
        if target is None:
            if name == HEAD:  # the second name of a tied embedding
                continue
            raise CheckpointError(
                f"{where} has a tensor {name}, which this model lacks; its config.json says which it is."
            )
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} is {list(tensor.shape)} there and {list(target.shape)} in this model."
            )
        missing.discard(name)
        if isinstance(target, DTensor):
            target.to_local().copy_(local_slice(tensor.to(target.dtype).to(target.device), target))
        else:
            target.copy_(tensor)
    if missing:
        raise CheckpointError(f"{where} lacks {len(missing)} tensors of this model, {min(missing)} first.")


def load_model(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> CausalLM:
    """The model in a Hugging Face folder, ready to evaluate.

    Args:
        dtype: type of the weights; None keeps float32.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = CausalLM(load_config(folder))
    model.to_empty(device=device)
    model.tie_weights()
    load_weights(model, folder)
    return model.to(dtype).eval() if dtype is not None else model.eval()
