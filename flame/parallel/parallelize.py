"""A model of a job, laid out over the mesh and initialised."""

from __future__ import annotations

import torch

from flame.config.sections import JobConfig
from flame.errors import ConfigError
from flame.models.config import ModelConfig
from flame.models.decoder import CausalLM, build_model
from flame.models.initialize import initialize_weights
from flame.parallel.activation_checkpoint import apply_activation_checkpointing
from flame.parallel.compile import compile_blocks
from flame.parallel.context import check_context_parallel
from flame.parallel.float8 import apply_float8
from flame.parallel.fsdp import ShardingOptions, apply_fsdp, parse_dtype
from flame.parallel.mesh import Degrees, Mesh
from flame.parallel.pipeline_split import schedule_kind
from flame.parallel.tensor import apply_tensor_parallel


def degrees_of(job: JobConfig) -> Degrees:
    """The mesh a job asks for; dp_shard may still be -1."""
    section = job.parallelism
    return Degrees(
        pp=section.pipeline_parallel_degree,
        dp_replicate=section.data_parallel_replicate_degree,
        dp_shard=section.data_parallel_shard_degree,
        cp=section.context_parallel_degree,
        tp=section.tensor_parallel_degree,
    )


def sharding_options(job: JobConfig) -> ShardingOptions:
    reshard = job.parallelism.fsdp_reshard_after_forward
    if reshard == "default" and job.parallelism.pipeline_parallel_degree > 1:
        reshard = "never"  # a stage would gather its blocks again for every micro-batch
    return ShardingOptions(
        param_dtype=parse_dtype(job.training.mixed_precision_param, "training.mixed_precision_param"),
        reduce_dtype=parse_dtype(job.training.mixed_precision_reduce, "training.mixed_precision_reduce"),
        reshard_after_forward=reshard,
        cpu_offload=job.training.enable_cpu_offload,
    )


def build_sharded_model(config: ModelConfig, job: JobConfig, mesh: Mesh, device: torch.device) -> CausalLM:
    """The model laid out over the mesh, with its initial weights."""
    with torch.device("meta"):
        model = build_model(config)
    parallelize(model, job, mesh, device)
    materialize(model, job, device)
    return model


def parallelize(model: CausalLM, job: JobConfig, mesh: Mesh, device: torch.device) -> None:
    """Checkpointing inside compiled regions, compiled regions inside FSDP units: in this order, in place.

    Raises:
        ConfigError: the model cannot be split as the job asks.
    """
    check_context_parallel(model, job, mesh.degrees.cp)
    if job.float8.enable:
        apply_float8(model, job.float8, device)
    if mesh.degrees.tp > 1:
        if job.compile.cuda_graph:
            raise ConfigError(
                "parallelism.tensor_parallel_degree above 1 needs compile.cuda_graph = false: recording the exchanges of "
                "tensor-parallel ranks has not been tried."
            )
        apply_tensor_parallel(model, mesh.axis("tp"), deals_rows=mesh.degrees.pp == 1)
    blocks = list(model.blocks)
    section = job.activation_checkpoint
    apply_activation_checkpointing(blocks, section.mode, section.selective_ac_option)
    if compiles(job, device):
        compile_blocks(blocks, job.compile.backend)
    apply_fsdp(model, blocks, mesh.fsdp, sharding_options(job))


def compiles(job: JobConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as the job says, else on GPUs only (on a CPU it costs more than it gains)."""
    if job.compile.enable != "auto":
        return job.compile.enable
    section = job.parallelism
    if section.pipeline_parallel_degree > 1 and schedule_kind(section.pipeline_parallel_schedule)[1].splits_backward:
        return False  # torch has compiled blocks compute all gradients at once
    return device.type == "cuda"


def materialize(model: CausalLM, job: JobConfig, device: torch.device) -> None:
    """Give a model built on the meta device memory and its initial weights, which do not depend on the mesh."""
    offload = job.training.enable_cpu_offload
    model.to_empty(device="cpu" if offload else device)
    initialize_weights(model, job.debug.seed)
    if offload:
        for module in model.modules():  # buffers are used where the computation is; FSDP moves parameters only
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
