"""Training loops to compare: ours, flash-linear-attention's models under FSDP2, and a compiled torch transformer.

Every loop trains the same shapes on the same batch with bf16 parameters gathered by FSDP2 from fp32 masters, fused AdamW
and clipping at norm 1. `build(name, job)` gives a function from a batch to the loss of one optimizer step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flame.config import JobConfig, model_values
from flame.graphed import GraphedStep
from flame.models.config import ModelConfig
from flame.models.context import token_positions
from flame.models.registry import resolve_config
from flame.optim.build import build_optimizer
from flame.parallel.mesh import build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.step import FiniteGuard, StepOptions, TrainStep

Step = Callable[["PackedBatch"], Tensor]


@dataclass(frozen=True)
class PackedBatch:
    """Rows [B, T], or one row of documents cut at cu_seqlens, the longest of `max_seqlen` tokens."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    shard: None = None


def build(name: str, job: JobConfig) -> tuple[Step, nn.Module]:
    """The loop `name` for the model of `job`, and its module.

    Raises:
        ImportError: the peer is not installed.
        ValueError: there is no such loop, or the peer has no such model.
    """
    if name not in LOOPS:
        raise ValueError(f"no loop {name!r}; there are {', '.join(LOOPS)}")
    torch.manual_seed(0)
    return LOOPS[name](job, resolve_config(model_values(job)))


def ours(job: JobConfig, config: ModelConfig) -> tuple[Step, nn.Module]:
    device = torch.device("cuda")
    mesh = build_mesh(degrees_of(job), "cuda", 1)
    model = build_sharded_model(config, job, mesh, device)
    guard = FiniteGuard(job.training.nan_policy, device)
    step = TrainStep(model, build_optimizer(job, model), guard, mesh.data_group, StepOptions(job.training.max_norm))
    run = GraphedStep(step, device) if job.compile.cuda_graph else step
    return lambda batch: run([batch], 1).loss, model


def graphed(job: JobConfig, config: ModelConfig) -> tuple[Step, nn.Module]:
    """Ours, replayed from a CUDA graph."""
    return ours(replace(job, compile=replace(job.compile, cuda_graph=True)), config)


def reference(job: JobConfig, config: ModelConfig, compiled: bool) -> tuple[Step, nn.Module]:
    """The same system from flash-linear-attention, with its own defaults."""
    import fla.models  # noqa: F401  registers its models with transformers
    from fla.ops.common import chunk_o
    from transformers import AutoConfig, AutoModelForCausalLM

    chunk_o.TRITON_ABOVE_3_7_1 = True  # else it refuses to run; its gradients may be wrong, its time is what it is
    known = AutoConfig.for_model(config.model_type).to_dict()
    values = {key: value for key, value in config.to_dict().items() if key in known and key != "model_type"}
    if values.get("num_heads", 0) is None:
        values.pop("num_heads")  # Mamba-2's own configuration infers it, and its initialization needs it
    with torch.device("cuda"):
        peer = AutoConfig.for_model(config.model_type, **values)
        model = AutoModelForCausalLM.from_config(peer, dtype=torch.float32).train()
    layers = model.model.layers if hasattr(model, "model") else model.backbone.layers
    if config.model_type == "mamba2" and importlib.util.find_spec("causal_conv1d") is None:
        for layer in layers:
            layer.mixer.eval()  # its other path: the same arithmetic with convolutions from Triton, and differentiable
    if compiled:
        for layer in layers:
            layer.compile()
    loss = sharded(model, layers)
    return optimize(
        job, model, lambda batch: loss(batch.input_ids, labels=batch.input_ids, **packing(batch)).loss
    ), model


def packing(batch: PackedBatch) -> dict[str, Tensor]:
    return {} if batch.cu_seqlens is None else {"cu_seqlens": batch.cu_seqlens}


def torch_transformer(job: JobConfig, config: ModelConfig) -> tuple[Step, nn.Module]:
    from benchmarks.torch_transformer import TorchTransformer
    from flame.models.mixers.transformer import TransformerConfig
    from flame.models.modules import GatedMLP

    if not isinstance(config, TransformerConfig):
        raise ValueError("the torch loop has only the transformer")
    with torch.device("meta"):
        width = GatedMLP(config).down_proj.in_features
    model = TorchTransformer(config, width).cuda()
    for layer in model.layers:
        layer.compile(fullgraph=True)
    loss = sharded(model, model.layers)

    def forward(batch: PackedBatch) -> Tensor:
        positions = token_positions(batch.input_ids.shape[1], batch.input_ids.device, batch.cu_seqlens)
        return loss(batch.input_ids, batch.labels, positions, batch.cu_seqlens, batch.max_seqlen)

    return optimize(job, model, forward), model


def sharded(model: nn.Module, layers: Any) -> Any:
    """FSDP2 over one rank, as a run on many would use it."""
    mesh = DeviceMesh("cuda", [0])
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def optimize(job: JobConfig, model: nn.Module, forward: Callable[[PackedBatch], Tensor]) -> Step:
    section = job.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )

    def step(batch: PackedBatch) -> Tensor:
        loss = forward(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


LOOPS: dict[str, Callable[[JobConfig, ModelConfig], tuple[Step, nn.Module]]] = {
    "flame": ours,
    "flame-graph": graphed,
    "fla": lambda job, config: reference(job, config, False),
    "fla-compiled": lambda job, config: reference(job, config, True),
    "torch": torch_transformer,
}
