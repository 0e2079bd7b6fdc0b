"""The device mesh pp x dp_replicate x dp_shard x cp x tp, and the parts of it that training asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flame.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first: tp peers sit next to each other
CONFIG_KEYS = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}


@dataclass(frozen=True)
class Degrees:
    """How many ways each axis splits the world; their product is the number of ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    def __str__(self) -> str:
        return " x ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)

    @property
    def data(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard


def resolve_degrees(degrees: Degrees, world_size: int) -> Degrees:
    """`degrees` with a dp_shard of -1 replaced by whatever the other axes leave.

    Raises:
        ConfigError: a degree is not positive, or the product does not equal the number of ranks.
    """
    for field in fields(degrees):
        value = getattr(degrees, field.name)
        if value < 1 and not (field.name == "dp_shard" and value == -1):
            also = ", or -1 for all remaining ranks" if field.name == "dp_shard" else ""
            raise ConfigError(f"parallelism.{CONFIG_KEYS[field.name]} = {value} must be at least 1{also}.")
    others = degrees.pp * degrees.dp_replicate * degrees.cp * degrees.tp
    if degrees.dp_shard == -1:
        if world_size % others:
            raise ConfigError(
                f"parallelism: {world_size} ranks cannot be divided by the other degrees ({degrees}, product {others}). "
                f"Change the degrees or the number of processes."
            )
        degrees = Degrees(degrees.pp, degrees.dp_replicate, world_size // others, degrees.cp, degrees.tp)
    if others * degrees.dp_shard != world_size:
        raise ConfigError(
            f"parallelism: {degrees} makes {others * degrees.dp_shard} ranks and there are {world_size}. "
            f"Set data_parallel_shard_degree = -1 to use all that is left, or start another number of processes."
        )
    return degrees


@dataclass(frozen=True)
class Mesh:
    """The world as a grid.

    Attributes:
        device_mesh: all five axes, in the order of `AXES`.
        data_rank: this rank's number among those that read different data (dp_replicate outer, dp_shard inner).
        data_group: ranks over which losses and token counts are summed.
    """

    degrees: Degrees
    device_mesh: DeviceMesh
    data_rank: int
    data_group: dist.ProcessGroup

    @property
    def data_size(self) -> int:
        return self.degrees.data

    def fsdp(self) -> DeviceMesh:
        """[dp_shard] for FSDP, [dp_replicate, dp_shard] when parameters are also replicated (HSDP)."""
        if self.degrees.dp_replicate > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]


def build_mesh(degrees: Degrees, device_type: str, world_size: int) -> Mesh:
    """The mesh over all ranks of the initialised default process group.

    Raises:
        ConfigError: the degrees do not fit the number of ranks, or ask for an axis that training cannot use yet.
    """
    degrees = resolve_degrees(degrees, world_size)
    for axis in ("pp", "cp", "tp"):
        if getattr(degrees, axis) > 1:
            raise ConfigError(
                f"parallelism.{CONFIG_KEYS[axis]} = {getattr(degrees, axis)}: not yet. Training uses data parallelism "
                f"only (data_parallel_replicate_degree, data_parallel_shard_degree); set this degree to 1."
            )
    shape = tuple(getattr(degrees, axis) for axis in AXES)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    coordinate = dict(zip(AXES, device_mesh.get_coordinate() or ()))
    data_rank = coordinate["dp_replicate"] * degrees.dp_shard + coordinate["dp_shard"]
    # With only data axes the data group is the world. Other axes will need a flattened submesh here.
    if degrees.data != math.prod(shape):
        raise ConfigError(f"parallelism: {degrees} splits more than the data.")
    group = dist.group.WORLD
    assert group is not None
    return Mesh(degrees, device_mesh, data_rank, group)
