"""The device mesh pp x dp_replicate x dp_shard x cp x tp, and the parts of it that training asks for."""

from __future__ import annotations

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
        fsdp: [dp_shard x cp] for FSDP, [dp_replicate, dp_shard x cp] when parameters are also replicated (HSDP). Context
            parallel ranks hold the same parameters and different tokens, so parameters are sharded over them too.
        data_rank: this rank's number among those that read different data (dp_replicate outer, dp_shard inner); the same
            for all its cp, tp and pp peers.
        data_group: one rank for each of the ranks that read different data.
        loss_group: ranks that hold different tokens (data x cp), over which losses and token counts are summed.
    """

    degrees: Degrees
    device_mesh: DeviceMesh
    fsdp: DeviceMesh
    data_rank: int
    data_group: dist.ProcessGroup
    loss_group: dist.ProcessGroup

    @property
    def data_size(self) -> int:
        return self.degrees.data

    def axis(self, name: str) -> DeviceMesh:
        """The 1-D mesh of this rank's peers along one of `AXES`."""
        return self.device_mesh[name]

    def group(self, name: str) -> dist.ProcessGroup:
        """This rank's peers along one of `AXES`."""
        return self.device_mesh.get_group(name)

    def rank(self, name: str) -> int:
        """This rank's number along one of `AXES`."""
        return self.device_mesh.get_local_rank(name)

    def groups(self) -> list[dist.ProcessGroup]:
        """Every group that training communicates in, once."""
        flat = [self.data_group, self.loss_group, *self.fsdp.get_all_groups()]
        return list(dict.fromkeys([*flat, *self.device_mesh.get_all_groups()]))


def build_mesh(degrees: Degrees, device_type: str, world_size: int) -> Mesh:
    """The mesh over all ranks of the initialised default process group.

    Raises:
        ConfigError: the degrees do not fit the number of ranks.
    """
    degrees = resolve_degrees(degrees, world_size)
    shape = tuple(getattr(degrees, axis) for axis in AXES)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    data_rank = device_mesh.get_local_rank("dp_replicate") * degrees.dp_shard + device_mesh.get_local_rank("dp_shard")
    shard = joint_axis(device_mesh, ("dp_shard", "cp"))
    fsdp = device_mesh["dp_replicate", axis_name(shard)] if degrees.dp_replicate > 1 else shard
    data_group = joint_axis(device_mesh, ("dp_replicate", "dp_shard")).get_group()
    loss_group = joint_axis(device_mesh, ("dp_replicate", "dp_shard", "cp")).get_group()
    return Mesh(degrees, device_mesh, fsdp, data_rank, data_group, loss_group)


def joint_axis(device_mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    """The 1-D mesh that joins `axes` into one; no new one is made where at most one of them has several ranks."""
    longer = tuple(axis for axis in axes if device_mesh[axis].size() > 1) or axes[:1]
    return device_mesh[longer[0]] if len(longer) == 1 else device_mesh[longer]._flatten("_".join(longer))


def axis_name(mesh: DeviceMesh) -> str:
    names = mesh.mesh_dim_names
    assert names is not None
    return names[0]
