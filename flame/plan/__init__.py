"""Tell what a job amounts to, without a GPU: parameters, FLOPs, memory a rank, layout, exchanges, parameter groups.

The model is built on the meta device, where tensors have shapes and no memory, and its ranks in a process group that has
no other processes, so that any size takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from flame.config import JobConfig, Layout, check_parallelism, load_job, model_values
from flame.data.build import microbatch_rows
from flame.errors import ConfigError
from flame.kernels.sequence import cut_sequence
from flame.models.decoder import CausalLM, build_model
from flame.optim.groups import ParameterGroup
from flame.parallel.fsdp import parse_dtype
from flame.parallel.mesh import Mesh
from flame.parallel.pipeline_stage import Boundary, find_boundaries
from flame.parallel.tensor import layer_plans
from flame.plan.activations import block_activations, count_blocks, count_exchanges
from flame.plan.communication import Links, Traffic, bubble, rank_traffic
from flame.plan.memory import LocalStage, Memory, rank_memory
from flame.plan.parameters import Parameters, count_parameters, optimizer_groups
from flame.plan.stages import all_stages, fake_mesh, local_model, micro_batches, shard_numel

__all__ = ["Links", "Plan", "block_activations", "count_parameters", "default_world_size", "make_plan", "shard_numel"]


@dataclass(frozen=True)
class Plan:
    """All figures of a job; see `flame.plan.report` for their meaning.

    Attributes:
        memory: of the rank that holds most.
        memory_by_rank, layers_by_rank: bytes on the device, and layers, of the ranks of a pipeline, in its order.
        micro_batches: of a rank in a step.
        traffic: of the rank that spends most time on it.
        bubble: part of its time that a pipeline stands still, None if the schedule leaves no such rule.
    """

    model: dict[str, Any]
    parameters: Parameters
    layout: Layout
    memory: Memory
    memory_by_rank: list[int]
    layers_by_rank: list[str]
    micro_batches: int
    traffic: list[Traffic]
    bubble: float | None
    links: Links
    groups: list[ParameterGroup]
    flops_per_token: float
    tokens_per_step: int
    tokens: int
    steps: int
    lr: float

    @property
    def compute_seconds(self) -> float:
        """Of a step, at the speed that `links` has."""
        return self.flops_per_token * self.tokens_per_step / self.layout.world_size / self.links.flops

    def to_dict(self) -> dict[str, Any]:
        """Figures as plain numbers and strings."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("parameters", "layout", "memory", "links")}
        plain = ["model", "flops_per_token", "tokens_per_step", "tokens", "steps", "compute_seconds", "bubble"]
        plain += ["memory_by_rank", "layers_by_rank", "micro_batches"]
        return {
            **{name: getattr(self, name) for name in plain},
            **{name: dataclasses.asdict(part) for name, part in parts.items()},
            "memory": {**dataclasses.asdict(self.memory), "device": self.memory.device},
            "groups": {group.name: [len(group.parameters), group.numel] for group in self.groups},
            "traffic": [dataclasses.asdict(entry) for entry in self.traffic],
        }


def make_plan(job: JobConfig, world_size: int, links: Links | None = None) -> Plan:
    """The plan of `job` on `world_size` ranks.

    Raises:
        ConfigError: the model, the batch or the layout is impossible.
    """
    layout, links = check_parallelism(job, world_size), links or Links()
    with torch.device("meta"):
        model = build_model(planned_model(job))
    layer_plans(model, layout.tp)  # refuses what cannot be split so many ways
    count = micro_batches(job, layout)
    with fake_mesh(layout) as mesh:
        by_rank = local_stages(model, job, layout, mesh)
        memory = [rank_memory(stages, job, layout, count) for stages in by_rank]
        traffic = [rank_traffic(stages, job, layout, mesh, count, links) for stages in by_rank]
    tokens_per_step = layout.global_batch * job.training.seq_len
    document = job.training.context_len if job.training.varlen else None
    return Plan(
        model=model.config.to_dict(),
        parameters=count_parameters(model),
        layout=layout,
        memory=max(memory, key=lambda entry: entry.device),
        memory_by_rank=[entry.device for entry in memory],
        layers_by_rank=[layers_of(stages) for stages in by_rank],
        micro_batches=count,
        traffic=max(traffic, key=lambda entries: sum(entry.seconds for entry in entries)),
        bubble=bubble(job, layout, count) if layout.pp > 1 else 0.0,
        links=links,
        groups=optimizer_groups(model, job),
        flops_per_token=model.flops_per_token(min(document or job.training.seq_len, job.training.seq_len)),
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * job.training.steps,
        steps=job.training.steps,
        lr=job.optimizer.lr,
    )


def local_stages(model: CausalLM, job: JobConfig, layout: Layout, mesh: Mesh) -> list[list[LocalStage]]:
    """The stages of every rank of a pipeline."""
    dtype = parse_dtype(job.training.mixed_precision_param, "training.mixed_precision_param")
    stages = all_stages(model, job, layout)
    whole = local_model(model, all_stages(model, job, dataclasses.replace(layout, pp=1))[0], mesh, dtype)
    blocks = count_blocks(whole, layout.tp)
    length = job.training.seq_len
    shard = cut_sequence(mesh.group("cp"), length, device="meta")[0] if layout.cp > 1 else None
    exchanges = count_exchanges(whole, layout.tp, microbatch_rows(job), length // layout.cp, shard)
    starts = [stage.first for stage in stages[1:]]
    boundaries = [Boundary(), *(find_boundaries(whole, starts, 64 * layout.tp) if starts else ()), Boundary()]
    by_rank: list[list[LocalStage]] = [[] for _ in range(layout.pp)]
    for stage in stages:
        part = local_model(model, stage, mesh)
        received, sent = boundaries[stage.index], boundaries[stage.index + 1]
        own = slice(stage.first, stage.last)
        by_rank[stage.rank].append(LocalStage(part, blocks[own], exchanges[own], received, sent))
    return by_rank


def layers_of(stages: list[LocalStage]) -> str:
    return ", ".join(f"{stage.part.stage.first} to {stage.part.stage.last - 1}" for stage in stages)


def planned_model(job: JobConfig) -> dict[str, Any]:
    """The model's keys; the vocabulary of a tokenizer on this disk is read if the model has none of its own."""
    values = model_values(job)
    if "vocab_size" in values:
        return values
    from flame.data.tokenizer import Tokenizer

    return model_values(job, Tokenizer.load(job.model.tokenizer_path).vocab_size)


def default_world_size(job: JobConfig) -> int:
    """The fewest ranks that the degrees allow."""
    section = job.parallelism
    shard = max(section.data_parallel_shard_degree, 1)
    others = section.pipeline_parallel_degree * section.context_parallel_degree * section.tensor_parallel_degree
    return others * section.data_parallel_replicate_degree * shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flame plan`."""
    links = Links()
    parser.add_argument("job", help="job file (TOML)")
    parser.add_argument("--world-size", type=int, help="number of ranks; by default the fewest that the job allows")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--node-size", type=int, default=links.node, help="ranks that share the fast links")
    parser.add_argument("--node-gbs", type=float, default=links.inside / 1e9, help="GB/s a rank sends within a node")
    parser.add_argument("--network-gbs", type=float, default=links.outside / 1e9, help="GB/s a rank sends beyond it")
    parser.add_argument("--tflops", type=float, default=links.flops / 1e12, help="TFLOP/s that a rank computes at")


def main(args: argparse.Namespace) -> int:
    """Print the plan of a job."""
    from flame.plan.report import render

    job = load_job(args.job, args.overrides)
    if args.world_size is not None and args.world_size < 1:
        raise ConfigError(f"--world-size {args.world_size} must be at least 1.")
    given = {
        "node-size": args.node_size,
        "node-gbs": args.node_gbs,
        "network-gbs": args.network_gbs,
        "tflops": args.tflops,
    }
    for name, value in given.items():
        if not value > 0:
            raise ConfigError(f"--{name} {value} must be above 0.")
    links = Links(args.node_size, args.node_gbs * 1e9, args.network_gbs * 1e9, flops=args.tflops * 1e12)
    plan = make_plan(job, default_world_size(job) if args.world_size is None else args.world_size, links)
    print(json.dumps(plan.to_dict(), indent=2) if args.json else render(plan))
    return 0
