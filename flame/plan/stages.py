"""What single ranks hold, from the model that they would build: on the meta device, in a process group that is not there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from flame.config import JobConfig, Layout
from flame.data.build import microbatch_rows
from flame.errors import FlameError
from flame.models.decoder import CausalLM
from flame.parallel.mesh import Degrees, Mesh, build_mesh
from flame.parallel.pipeline_split import Stage, stages_of_job
from flame.parallel.pipeline_stage import Boundary, StageModel
from flame.parallel.tensor import apply_tensor_parallel


@contextmanager
def fake_mesh(layout: Layout) -> Iterator[Mesh]:
    """The mesh of rank 0 among ranks that exist in name only; collectives on meta tensors give results of the right shape."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise FlameError("a plan needs a process of its own, without a process group.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        degrees = Degrees(layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
        yield build_mesh(degrees, "cpu", layout.world_size)
    finally:
        dist.destroy_process_group()


def micro_batches(job: JobConfig, layout: Layout) -> int:
    """Forwards and backwards of a rank in a step."""
    return layout.global_batch // (layout.data_ranks * microbatch_rows(job))


def all_stages(model: CausalLM, job: JobConfig, layout: Layout) -> list[Stage]:
    """The stages of the whole model, which is one without a pipeline."""
    if layout.pp == 1:
        return [Stage(0, 1, 0, len(model.blocks), 0)]
    return stages_of_job(model, job, layout.pp, micro_batches(job, layout))


def local_model(model: CausalLM, stage: Stage, mesh: Mesh, dtype: torch.dtype | None = None) -> StageModel:
    """A stage on the meta device as a tensor-parallel rank has it, in `dtype` if given."""
    with torch.device("meta"):
        part = StageModel(model.config, stage, Boundary(), Boundary())
    part.to(dtype)
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(part, mesh.axis("tp"), deals_rows=False)  # one row is looked at
    return part


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    """What a tensor-parallel rank has of a parameter."""
    return tuple(parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape)


def held(parameters: Iterable[Tensor]) -> int:
    """Elements of parameters that FSDP has gathered."""
    return sum(math.prod(local_shape(parameter)) for parameter in parameters)


def shard_numel(shape: tuple[int, ...], ranks: int) -> int:
    """Elements that FSDP2 allocates a rank: rows are dealt out like torch.chunk, and every rank pads to the longest."""
    if not shape:
        return 1
    return math.ceil(shape[0] / ranks) * math.prod(shape[1:])
