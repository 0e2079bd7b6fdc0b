"""Tell what a job amounts to, without a GPU: parameters, FLOPs, memory a rank, layout, tokens, parameter groups.

The model is built on the meta device, where tensors have shapes and no memory, so that any size takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flame.config import JobConfig, Layout, check_parallelism, load_job, model_values
from flame.errors import ConfigError
from flame.models.context import Context, make_context
from flame.models.decoder import CausalLM, build_model
from flame.models.sharding import stored_dimension
from flame.optim.groups import ParameterGroup, describe_groups, parameter_groups, split_matrices
from flame.parallel.tensor import layer_plans, parameter_uses

FP32, BF16 = 4, 2
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROBE_LENGTH = 64  # tokens in the meta forward that activations are counted in; they grow linearly from there
LOSS_CHUNK = 1 << 23  # logits that the fused loss holds at a time


@dataclass(frozen=True)
class Parameters:
    """Counts of the whole model. A head that shares the embedding's weight counts there."""

    total: int
    embedding: int
    head: int
    blocks: dict[str, tuple[int, int]]
    """Kind of block, by its mixer -> (number of blocks, parameters of each)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most, in the middle of a backward.

    Attributes:
        weights: sharded fp32 parameters.
        gradients: their fp32 gradients.
        optimizer: moments (AdamW two, Muon one a matrix), fp32.
        gathered: parameters in the compute dtype that FSDP has gathered, and gradients not yet reduced.
        activations: kept from the forward, and recomputed in the backward (`block_activations`).
        loss: what the fused loss adds: logits of a chunk of tokens, gradients of the hidden states and of the head.
        offloaded: the part of the first three that lies in host memory (training.enable_cpu_offload).
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    offloaded: int = 0

    @property
    def device(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.gathered, self.activations, self.loss)
        return sum(parts) - self.offloaded


@dataclass(frozen=True)
class Plan:
    """All figures of a job; see `render` for their meaning."""

    model: dict[str, Any]
    parameters: Parameters
    layout: Layout
    memory: Memory
    groups: list[ParameterGroup]
    flops_per_token: float
    tokens_per_step: int
    tokens: int
    steps: int
    lr: float

    def to_dict(self) -> dict[str, Any]:
        """Figures as plain numbers and strings."""
        names = ("parameters", "layout", "memory")
        figures = {name: dataclasses.asdict(getattr(self, name)) for name in names}
        figures["memory"]["device"] = self.memory.device
        figures["groups"] = {group.name: [len(group.parameters), group.numel] for group in self.groups}
        plain = ("model", "flops_per_token", "tokens_per_step", "tokens", "steps")
        return {**{name: getattr(self, name) for name in plain}, **figures}


def make_plan(job: JobConfig, world_size: int) -> Plan:
    """The plan of `job` on `world_size` ranks.

    Raises:
        ConfigError: the model, the batch or the layout is impossible.
    """
    layout = check_parallelism(job, world_size)
    with torch.device("meta"):
        model = build_model(planned_model(job))
    layer_plans(model, layout.tp)  # refuses what cannot be split so many ways
    tokens_per_step = layout.global_batch * job.training.seq_len
    document = job.training.context_len if job.training.varlen else None
    return Plan(
        model=model.config.to_dict(),
        parameters=count_parameters(model),
        layout=layout,
        memory=estimate_memory(model, job, layout),
        groups=optimizer_groups(model, job),
        flops_per_token=model.flops_per_token(min(document or job.training.seq_len, job.training.seq_len)),
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * job.training.steps,
        steps=job.training.steps,
        lr=job.optimizer.lr,
    )


def planned_model(job: JobConfig) -> dict[str, Any]:
    """The model's keys; the vocabulary of a tokenizer on this disk is read if the model has none of its own."""
    values = model_values(job)
    if "vocab_size" in values:
        return values
    from flame.data.tokenizer import Tokenizer

    return model_values(job, Tokenizer.load(job.model.tokenizer_path).vocab_size)


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


def shard_numel(shape: tuple[int, ...], ranks: int) -> int:
    """Elements that FSDP2 allocates a rank: rows are dealt out like torch.chunk, and every rank pads to the longest."""
    if not shape:
        return 1
    return math.ceil(shape[0] / ranks) * math.prod(shape[1:])


def split_shapes(model: CausalLM, ranks: int) -> dict[int, tuple[int, ...]]:
    """What a tensor-parallel rank holds of every parameter, by the parameter's id."""
    uses = parameter_uses(layer_plans(model, ranks)) if ranks > 1 else {}
    shapes = {}
    for name, parameter in model.named_parameters():
        shape, dim = list(parameter.shape), stored_dimension(uses.get(name), ranks)
        if dim is not None:
            shape[dim] //= ranks
        shapes[id(parameter)] = tuple(shape)
    return shapes


def estimate_memory(model: CausalLM, job: JobConfig, layout: Layout) -> Memory:
    """Memory of one rank.

    Sharded quantities are exact. Pipeline parallelism is taken to give every stage as many blocks, the last one the head
    too.
    """
    stage, shapes = stage_parameters(model, layout), split_shapes(model, layout.tp)
    shard = {id(item): shard_numel(shapes[id(item)], layout.dp_shard * layout.cp) for item in stage}
    sharded = sum(shard.values())
    muon = split_matrices(parameter_groups(model, 0.0), [f"{model.backbone_name}.layers."])[0]
    matrices = {id(item) for group in muon for item in group.parameters.values()}
    once = [item for item in stage if job.optimizer.name == "Muon" and id(item) in matrices]
    moments = 2 * sharded - sum(shard[id(item)] for item in once)
    kept = FP32 * (2 * sharded + moments)
    return Memory(
        weights=FP32 * sharded,
        gradients=FP32 * sharded,
        optimizer=FP32 * moments,
        gathered=gathered_bytes(model, job, layout),
        activations=activation_bytes(model, job, layout),
        loss=loss_bytes(model, job, layout),
        offloaded=kept if job.training.enable_cpu_offload else 0,
    )


def stage_blocks(model: CausalLM, layout: Layout) -> list[nn.Module]:
    """The blocks of the last pipeline stage, or all."""
    blocks = list(model.blocks)
    return blocks[-math.ceil(len(blocks) / layout.pp) :]


def stage_parameters(model: CausalLM, layout: Layout) -> list[Tensor]:
    """Parameters of the last pipeline stage, which has the head, or all."""
    if layout.pp == 1:
        return list(model.parameters())
    inside = [item for block in stage_blocks(model, layout) for item in block.parameters()]
    return [*inside, *model.lm_head.parameters()]


def gathered_bytes(model: CausalLM, job: JobConfig, layout: Layout) -> int:
    """What FSDP holds unsharded at the height of the backward.

    Parameters in the compute dtype: the root unit (embedding, norm, head), which stays gathered, and two blocks, the
    current one and the next being prefetched; all blocks under `never`. Gradients before their reduction: those of a
    block in the compute dtype and, for the reduction, in the reduce dtype; or, if they are reduced once a step after
    several micro-batches, those of the whole stage in the reduce dtype.
    """
    training, section = job.training, job.parallelism
    compute, reduce = BYTES[training.mixed_precision_param], BYTES[training.mixed_precision_reduce]
    shapes = split_shapes(model, layout.tp)

    def held(parameters: Iterable[Tensor]) -> int:
        return sum(math.prod(shapes[id(parameter)]) for parameter in parameters)

    blocks = [held(block.parameters()) for block in stage_blocks(model, layout)]
    stage = held(stage_parameters(model, layout))
    root, largest = stage - sum(blocks), max(blocks)
    alive = sum(blocks) if section.fsdp_reshard_after_forward == "never" else min(2 * largest, sum(blocks))
    unreduced = (compute + reduce) * max(largest, root)
    if layout.accumulation > 1 and not section.reduce_each_microbatch:
        unreduced = reduce * stage + compute * largest
    return compute * (root + alive) + unreduced


@dataclass(frozen=True)
class BlockActivations:
    """Bytes a token that a block's forward leaves behind, by what is done about them.

    Attributes:
        stream: the block's input, all that `full` checkpointing keeps.
        kept: without checkpointing.
        kept_by_op: with selective checkpointing by operation.
    """

    stream: float
    kept: float
    kept_by_op: float


def block_activations(block: nn.Module, x: Tensor, ctx: Context) -> BlockActivations:
    """Count what autograd keeps of a block.

    That is, nearly: every tensor that enters or leaves one of its leaf modules (projections, norms, convolutions), once.
    The outputs of projections and convolutions are what the kernel between them keeps, the kernel's output is what the
    norm or projection after it keeps, and the products of elementwise operations enter the next projection. Left out
    are what lies between two elementwise operations and the chunk states of a kernel. Selective checkpointing keeps what
    projections and kernels make: outputs of nn.Linear, and inputs of nn.Linear that no leaf module made.

    Args:
        block: on the meta device, in the compute dtype.
        x: [1, T, D] the residual stream.
    """
    seen: dict[int, Tensor] = {}
    made, by_op = set(), {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in tensors_in(inputs):
            seen[tensor.untyped_storage()._cdata] = tensor
            if isinstance(module, nn.Linear) and tensor.untyped_storage()._cdata not in made:
                by_op[tensor.untyped_storage()._cdata] = tensor
        for tensor in tensors_in((output,)):
            seen[tensor.untyped_storage()._cdata] = tensor
            made.add(tensor.untyped_storage()._cdata)
            if isinstance(module, nn.Linear):
                by_op[tensor.untyped_storage()._cdata] = tensor

    leaves = [module for module in block.modules() if not list(module.children())]
    handles = [module.register_forward_hook(note) for module in leaves]
    block(x, ctx)
    for handle in handles:
        handle.remove()
    tokens = x.shape[0] * x.shape[1]

    def size(tensors: Iterable[Tensor]) -> float:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / tokens

    stream = size([x])
    return BlockActivations(stream, size(seen.values()), stream + size(by_op.values()))


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values and the tuples and lists in them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found


def activation_bytes(model: CausalLM, job: JobConfig, layout: Layout) -> int:
    """Activations of a micro-batch: of all blocks, plus those of one block while it is computed again.

    Token dimensions are split over context parallel ranks. Tensor parallel ranks split the stream by tokens and layers by
    widths, but each keeps all the tokens that its layers read: the gathered inputs of the mixer and of the MLP. A
    pipeline stage holds the micro-batches of up to `pp` stages at a time (1F1B).
    """
    training, section = job.training, job.activation_checkpoint
    tokens = training.local_batch_size * training.seq_len / layout.cp
    counts = count_blocks(model, job, layout)
    total = 0.0
    for index, count in enumerate(counts):
        if section.mode == "full":
            total += count.stream
        elif section.mode == "selective" and section.selective_ac_option == "op":
            total += count.kept_by_op
        elif section.mode == "selective" and index % int(section.selective_ac_option) == 0:
            total += count.stream
        else:
            total += count.kept
    again = 0.0 if section.mode == "none" else max(count.kept - count.stream for count in counts)
    hidden = 2 * model.config.hidden_size * BYTES[training.mixed_precision_param]  # before and after the final norm
    gathered = 0.0 if section.mode == "full" else hidden * len(counts) * (1 - 1 / layout.tp)
    return math.ceil(tokens * ((total + again + hidden) / layout.tp + gathered))


def count_blocks(model: CausalLM, job: JobConfig, layout: Layout) -> list[BlockActivations]:
    """Activations of every block of a stage, from a short forward on the meta device.

    The first two blocks of a kind are run (the first of all may do more than later ones), the rest count like the second.
    """
    dtype = getattr(torch, job.training.mixed_precision_param)
    known: dict[tuple[str, int], list[BlockActivations]] = {}
    counts = []
    with torch.device("meta"), torch.no_grad():
        probe = build_model(model.config).to(dtype)
        x = torch.empty(1, PROBE_LENGTH, model.config.hidden_size, dtype=dtype)
        ctx, carried = make_context(PROBE_LENGTH, x.device), probe.decoder.initial_carried()
        for block in probe.blocks:
            same = known.setdefault((type(block.token_mixer).__name__, numel(block.parameters())), [])
            if len(same) < 2:
                inner = ctx.at_layer(None, carried)
                same.append(block_activations(block, x, inner))
                x, carried = block(x, inner)
            counts.append(same[-1])
    return counts[-len(stage_blocks(model, layout)) :]


def loss_bytes(model: CausalLM, job: JobConfig, layout: Layout) -> int:
    """Logits of a chunk and their gradient in fp32, gradients of the hidden states and (fp32) of the head."""
    training, config = job.training, model.config
    tokens = training.local_batch_size * training.seq_len // layout.cp
    logits = min(LOSS_CHUNK, tokens * config.vocab_size)
    hidden = tokens * config.hidden_size * BYTES[training.mixed_precision_param]
    return 2 * FP32 * logits + hidden + math.ceil(FP32 * numel(model.lm_head.parameters()) / layout.tp)


def render(plan: Plan) -> str:
    """The plan as text."""
    layout, memory = plan.layout, plan.memory
    flops = plan.flops_per_token * plan.tokens_per_step
    mesh = " x ".join(f"{axis}={getattr(layout, axis)}" for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))
    lines = [
        f"Model: {plan.model['model_type']}",
        *table(parameter_rows(plan.parameters)),
        "",
        f"Layout: {layout.world_size} ranks, {mesh}",
        *table(
            [
                ("sequences per step", f"{layout.global_batch:,}"),
                ("micro-batches per step and rank", f"{layout.accumulation:,}"),
                ("tokens per step", f"{plan.tokens_per_step:,}"),
                (f"tokens in {plan.steps:,} steps", f"{plan.tokens:,}"),
                ("tokens per parameter", f"{plan.tokens / plan.parameters.total:.1f}"),
            ]
        ),
        "",
        "FLOPs, forward and backward, without recomputation",
        *table(
            [
                ("per token", scaled(plan.flops_per_token)),
                ("per step", scaled(flops)),
                ("per step and rank", scaled(flops / layout.world_size)),
                ("whole run", scaled(flops * plan.steps)),
            ]
        ),
        "",
        "Memory of the rank that holds most",
        *table(memory_rows(memory)),
        "  Activations are an estimate. Not counted: the CUDA context, NCCL's buffers, fragmentation.",
        *layout_notes(layout),
        "",
        "Optimizer",
        *("  " + line for line in describe_groups(plan.groups, plan.lr).splitlines()),
    ]
    return "\n".join(lines)


def parameter_rows(parameters: Parameters) -> list[tuple[str, str]]:
    blocks = [
        (f"{count} x {kind} block", f"{size:,} each") for kind, (count, size) in sorted(parameters.blocks.items())
    ]
    head = f"{parameters.head:,}" if parameters.head else "shares the embedding"
    return [
        ("parameters", f"{parameters.total:,}"),
        ("embedding", f"{parameters.embedding:,}"),
        *blocks,
        ("head", head),
    ]


def memory_rows(memory: Memory) -> list[tuple[str, str]]:
    names = {
        "weights": "weights (fp32, sharded)",
        "gradients": "gradients (fp32, sharded)",
        "optimizer": "optimizer state (fp32, sharded)",
        "gathered": "gathered weights, unreduced gradients",
        "activations": "activations",
        "loss": "loss",
    }
    rows = [(text, gibibytes(getattr(memory, name))) for name, text in names.items()]
    if memory.offloaded:
        rows.append(("of these in host memory", gibibytes(memory.offloaded)))
    return [*rows, ("together on the device", gibibytes(memory.device))]


def layout_notes(layout: Layout) -> list[str]:
    if layout.pp == 1:
        return []
    return ["  Pipeline parallelism is taken to split blocks evenly."]


def table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def gibibytes(size: float) -> str:
    return f"{size / 2**30:8.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:8.2f} MiB"


def scaled(value: float) -> str:
    """1.5e12 -> 1.50 TFLOP."""
    for limit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {prefix}FLOP"
    return f"{value:.0f} FLOP"


def default_world_size(job: JobConfig) -> int:
    """The fewest ranks that the degrees allow."""
    section = job.parallelism
    shard = max(section.data_parallel_shard_degree, 1)
    others = section.pipeline_parallel_degree * section.context_parallel_degree * section.tensor_parallel_degree
    return others * section.data_parallel_replicate_degree * shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flame plan`."""
    parser.add_argument("job", help="job file (TOML)")
    parser.add_argument("--world-size", type=int, help="number of ranks; by default the fewest that the job allows")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the plan of a job."""
    job = load_job(args.job, args.overrides)
    if args.world_size is not None and args.world_size < 1:
        raise ConfigError(f"--world-size {args.world_size} must be at least 1.")
    plan = make_plan(job, default_world_size(job) if args.world_size is None else args.world_size)
    print(json.dumps(plan.to_dict(), indent=2) if args.json else render(plan))
    return 0
