"""A small model on any data-parallel layout, and packed batches with uneven documents."""

from dataclasses import dataclass

import torch

from flame.models.decoder import build_model
from flame.models.initialize import initialize_weights
from flame.optim.adamw import AdamW, AdamWOptions
from flame.optim.groups import parameter_groups
from flame.optim.optimizer import Optimizer
from flame.optim.schedules import LearningRate, Schedule
from flame.parallel.activation_checkpoint import apply_activation_checkpointing
from flame.parallel.fsdp import ShardingOptions, apply_fsdp
from flame.parallel.mesh import build_mesh
from flame.parallel.tensor import apply_tensor_parallel
from flame.step import FiniteGuard, StepOptions, TrainStep

CONFIG = {
    "model_type": "transformer",
    "hidden_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 67,
}
LENGTH = 24


@dataclass
class Packed:
    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int | None = None
    shard: object = None


def packed_row(index):
    """Sequence `index` of the run: documents of uneven length, and a share of ignored labels that differs by row."""
    generator = torch.Generator().manual_seed(100 + index)
    tokens = torch.randint(0, CONFIG["vocab_size"], (LENGTH + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[: (index * 7) % LENGTH] = -100
    cut = 1 + (index * 5) % (LENGTH - 1)
    return Packed(tokens[None, :-1], labels[None], torch.tensor([0, cut, LENGTH], dtype=torch.int32))


def micro_batches(step, rank, world_size, global_batch):
    """This rank's rows of a step, one row a micro-batch."""
    rows = range(step * global_batch, (step + 1) * global_batch)
    return [packed_row(index) for index in rows if index % world_size == rank]


def merge(batches, count):
    """The same rows in `count` micro-batches: rows are laid end to end, documents stay apart."""
    size, merged = len(batches) // count, []
    for start in range(0, len(batches), size):
        part = batches[start : start + size]
        starts = [row.cu_seqlens[:-1] + i * LENGTH for i, row in enumerate(part)]
        ends = torch.tensor([len(part) * LENGTH], dtype=torch.int32)
        ids, labels = (torch.cat([getattr(row, key) for row in part], 1) for key in ("input_ids", "labels"))
        merged.append(Packed(ids, labels, torch.cat([*starts, ends])))
    return merged


def sharded_model(degrees, world_size, config=None, checkpointing="none", **options):
    options = {"param_dtype": torch.float32, **options}
    with torch.device("meta"):
        model = build_model(config or CONFIG)
    mesh = build_mesh(degrees, "cpu", world_size)
    if degrees.tp > 1:
        apply_tensor_parallel(model, mesh.axis("tp"))
    apply_activation_checkpointing(list(model.blocks), checkpointing, "op")
    apply_fsdp(model, list(model.blocks), mesh.fsdp, ShardingOptions(**options))
    model.to_empty(device="cpu")
    initialize_weights(model, seed=1)
    return model, mesh


def make_step(degrees, world_size, policy="skip", config=None, step_options=None, **sharding):
    model, mesh = sharded_model(degrees, world_size, config, **sharding)
    # With a tiny eps, Adam turns rounding noise in a gradient that is almost zero into a full-size update.
    rule = AdamW(parameter_groups(model, 0.1), AdamWOptions(eps=1e-4))
    rate = LearningRate(Schedule(20, warmup_steps=2), 1e-2, torch.device("cpu"))
    optimizer = Optimizer({"adamw": rule}, rate)
    guard = FiniteGuard(policy, torch.device("cpu"))
    return TrainStep(model, optimizer, guard, mesh.loss_group, step_options or StepOptions()), mesh


def full_parameters(model):
    return {name: parameter.detach().full_tensor().clone() for name, parameter in model.named_parameters()}
