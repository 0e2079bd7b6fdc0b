"""Counts of a model's parameters, and the groups that its optimizer will have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from flame.config import JobConfig
from flame.models.decoder import CausalLM
from flame.optim.groups import ParameterGroup, parameter_groups, split_matrices


@dataclass(frozen=True)
class Parameters:
    """Counts of the whole model. A head that shares the embedding's weight counts there."""

    total: int
    embedding: int
    head: int
    blocks: dict[str, tuple[int, int]]
    """Kind of block, by its mixer -> (number of blocks, parameters of each)."""


def count_parameters(model: CausalLM) -> Parameters:
    blocks: dict[str, tuple[int, int]] = {}
    sizes = [(type(block.token_mixer).__name__, numel(block.parameters())) for block in model.blocks]
    for mixer, size in sizes:
        same = sorted({other for name, other in sizes if name == mixer})
        kind = mixer if len(same) == 1 else f"{mixer} {same.index(size) + 1}"
        blocks[kind] = (blocks.get(kind, (0, 0))[0] + 1, size)
    tied = model.lm_head.weight is model.decoder.embeddings.weight
    return Parameters(
        total=numel(model.parameters()),
        embedding=numel(model.decoder.embeddings.parameters()),
        head=0 if tied else numel(model.lm_head.parameters()),
        blocks=blocks,
    )


def numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def optimizer_groups(model: CausalLM, job: JobConfig) -> list[ParameterGroup]:
    """The groups that the optimizer will have, Muon's matrices first."""
    groups = parameter_groups(model, job.optimizer.weight_decay)
    if job.optimizer.name != "Muon":
        return groups
    matrices, rest = split_matrices(groups, [f"{model.backbone_name}.layers."])
    return [*matrices, *rest]
