"""Memory of a rank at the height of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flame.config import JobConfig, Layout
from flame.data.build import microbatch_rows
from flame.optim.groups import parameter_groups, split_matrices
from flame.parallel.pipeline_split import ScheduleKind, schedule_kind
from flame.parallel.pipeline_stage import Boundary, StageModel
from flame.plan.activations import BlockActivations, Exchanges
from flame.plan.stages import held, local_shape, shard_numel

FP32 = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOSS_CHUNK = 1 << 23  # logits that the fused loss holds at a time


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    A step is highest either at the loss, with the activations of all micro-batches that are under way, or in the last
    backward, when activations have gone and the sharded gradients are complete.

    Attributes:
        weights: sharded fp32 parameters.
        gradients: their fp32 gradients.
        optimizer: moments (AdamW two, Muon one a matrix), fp32.
        gathered: parameters in the compute dtype that FSDP has gathered.
        accumulated: unsharded gradients of earlier micro-batches, in the reduce dtype.
        activations: kept from forwards until their backwards.
        recomputed: one block's activations computed again, and its gradients before they are reduced.
        loss: what the fused loss adds: logits of a chunk of tokens, gradients of the hidden states and of the head.
        buffers: what a pipeline receives activations and gradients in, for every micro-batch.
        offloaded: the part of the first three that lies in host memory (training.enable_cpu_offload).
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    accumulated: int
    activations: int
    recomputed: int
    loss: int
    buffers: int = 0
    offloaded: int = 0

    @property
    def device(self) -> int:
        """The height of the step, on the device."""
        always = self.gathered + self.accumulated + self.buffers
        always += 0 if self.offloaded else self.weights + self.optimizer
        at_loss = self.activations + max(self.loss, self.recomputed)
        at_end = self.recomputed + (0 if self.offloaded else self.gradients)
        return always + max(at_loss, at_end)


@dataclass(frozen=True)
class LocalStage:
    """A stage as one of its ranks has it.

    Attributes:
        part: its modules, on the meta device, with their tensor-parallel parameters.
        blocks: activations of its blocks.
        exchanges: what each of its blocks exchanges in the forward of a micro-batch.
        received, sent: what travels to and from it.
    """

    part: StageModel
    blocks: list[BlockActivations]
    exchanges: list[Exchanges]
    received: Boundary
    sent: Boundary


def rank_memory(stages: Sequence[LocalStage], job: JobConfig, layout: Layout, count: int) -> Memory:
    """Memory of a rank that has `stages`, with `count` micro-batches in a step."""
    parts = [stage.part for stage in stages]
    ranks = layout.dp_shard * layout.cp
    sharded = sum(shard_numel(local_shape(item), ranks) for part in parts for item in part.parameters())
    moments = 2 * sharded
    if job.optimizer.name == "Muon":
        moments -= sum(shard_numel(local_shape(item), ranks) for part in parts for item in muon_matrices(part))
    tokens = microbatch_rows(job) * job.training.seq_len / layout.cp
    under_way = micro_batches_under_way(job, layout, [part.stage.index for part in parts], count)
    activations = sum(
        many * tokens * stage_activations(stage, job, layout) for many, stage in zip(under_way, stages, strict=True)
    )
    rows = microbatch_rows(job)
    buffers = sum(
        count * boundary.bytes(rows, job.training.seq_len // layout.cp)
        for stage in stages
        for boundary in (stage.received, stage.sent)
    )
    return Memory(
        weights=FP32 * sharded,
        gradients=FP32 * sharded,
        optimizer=FP32 * moments,
        gathered=sum(gathered_bytes(part, job, layout) for part in parts),
        accumulated=sum(accumulated_bytes(part, job, count) for part in parts),
        activations=math.ceil(activations),
        recomputed=max(backward_bytes(stage, job, tokens) for stage in stages),
        loss=max(loss_bytes(part, job, tokens) for part in parts),
        buffers=buffers,
        offloaded=FP32 * (2 * sharded + moments) if job.training.enable_cpu_offload else 0,
    )


def muon_matrices(part: StageModel) -> list:
    groups = split_matrices(parameter_groups(part, 0.0), [f"{part.backbone_name}.layers."])[0]
    return [item for group in groups for item in group.parameters.values()]


def keeps_gathered(job: JobConfig, layout: Layout) -> bool:
    """Whether blocks stay gathered from their forward to their backward (`flame.parallel.fsdp.apply_fsdp`)."""
    policy = job.parallelism.fsdp_reshard_after_forward
    return policy == "never" or (policy == "default" and (layout.pp > 1 or layout.dp_shard * layout.cp == 1))


def gathered_bytes(part: StageModel, job: JobConfig, layout: Layout) -> int:
    """Parameters in the compute dtype at the height of the step: the root unit (embedding, norm, head), which stays
    gathered, and two blocks, the current one and the next being prefetched; or all blocks."""
    blocks = [held(block.parameters()) for block in part.blocks]
    root = held(part.parameters()) - sum(blocks)
    alive = sum(blocks) if keeps_gathered(job, layout) else min(2 * max(blocks), sum(blocks))
    return BYTES[job.training.mixed_precision_param] * (root + alive)


def accumulated_bytes(part: StageModel, job: JobConfig, count: int) -> int:
    """Gradients of a stage in the reduce dtype, if they are reduced once a step after several micro-batches."""
    if count == 1 or job.parallelism.reduce_each_microbatch:
        return 0
    return BYTES[job.training.mixed_precision_reduce] * held(part.parameters())


def backward_bytes(stage: LocalStage, job: JobConfig, tokens: float) -> int:
    """The largest block in its backward: activations computed again and their gradients, and those of its weights as
    computed and as reduced."""
    training, section, again = job.training, job.activation_checkpoint, 0.0
    if section.mode != "none":
        by_op = section.mode == "selective" and section.selective_ac_option == "op"
        again = max(b.kept - (b.kept_by_op if by_op else b.stream) + b.gradients for b in stage.blocks)
    largest = max(held(block.parameters()) for block in stage.part.blocks)
    unreduced = BYTES[training.mixed_precision_param] + BYTES[training.mixed_precision_reduce]
    return math.ceil(again * tokens) + unreduced * largest


def stage_activations(stage: LocalStage, job: JobConfig, layout: Layout) -> float:
    """Bytes a token that a stage keeps of a micro-batch until its backward."""
    section, total = job.activation_checkpoint, 0.0
    for index, block in enumerate(stage.blocks):
        if section.mode == "full":
            total += block.stream
        elif section.mode == "selective" and section.selective_ac_option == "op":
            total += block.kept_by_op
        elif section.mode == "selective" and index % int(section.selective_ac_option) == 0:
            total += block.stream
        else:
            total += block.kept
    if (
        stage.part.stage.is_last
    ):  # before and after the final norm; all tokens of the latter on every tensor-parallel rank
        width = stage.part.config.hidden_size * BYTES[job.training.mixed_precision_param]
        total += width / layout.tp + width
    return total


def micro_batches_under_way(job: JobConfig, layout: Layout, indices: list[int], count: int) -> list[float]:
    """How many micro-batches' activations a rank holds of each of its stages, at most."""
    if layout.pp == 1:
        return [1.0]
    name, kind = schedule_kind(job.parallelism.pipeline_parallel_schedule)
    if name in ("GPipe", "LoopedBFS"):
        return [float(count)] * len(indices)
    if not kind.several:
        return [float(min(count, layout.pp - indices[0]))]
    together = min(float(count * len(indices)), chunks_under_way(kind, layout.pp, indices))
    return [together / len(indices)] * len(indices)


def chunks_under_way(kind: ScheduleKind, ranks: int, indices: list[int]) -> float:
    """Micro-batches of a stage that a rank with several stages holds before it runs a backward for every forward."""
    if kind.folded:
        return 2.0 * ranks + 1
    return (len(indices) - 1) * ranks + 2 * (ranks - 1 - indices[0] % ranks) + 1


def loss_bytes(part: StageModel, job: JobConfig, tokens: float) -> int:
    """Logits of a chunk and their gradient in fp32, gradients of the hidden states and (fp32) of the head."""
    if not part.stage.is_last:
        return 0
    head = part.lm_head._parameters["weight"]
    assert head is not None
    logits = min(LOSS_CHUNK, math.ceil(tokens) * local_shape(head)[0])
    hidden = math.ceil(tokens) * part.config.hidden_size * BYTES[job.training.mixed_precision_param]
    return 2 * FP32 * logits + hidden + FP32 * held([head])
