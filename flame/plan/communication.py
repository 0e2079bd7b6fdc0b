"""What ranks send to one another in a step, axis by axis, and how long links of a given speed take for it.

Collectives are counted as rings: of n ranks, each sends (n - 1) / n of what is gathered or scattered, and twice that to sum
on all ranks. The seconds are those of an axis on its own; what overlaps with computation costs nothing, and what must be
waited for (tensor, context) costs all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flame.config import JobConfig, Layout
from flame.data.build import microbatch_rows
from flame.parallel.mesh import AXES, Mesh
from flame.plan.memory import BYTES, FP32, LocalStage, keeps_gathered
from flame.plan.stages import held, local_shape, shard_numel


@dataclass(frozen=True)
class Links:
    """Speeds of the hardware.

    Attributes:
        node: ranks that share the fast links.
        inside, outside: bytes a second that a rank sends, within its node and beyond it.
        latency: seconds of one exchange.
        flops: operations a second that a rank reaches while it computes.
    """

    node: int = 8
    inside: float = 400e9
    outside: float = 45e9
    latency: float = 20e-6
    flops: float = 400e12


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange along one axis, of one rank in one step."""

    axis: str
    what: str
    ranks: int
    exchanges: float
    sent: float
    seconds: float


def spans_nodes(axis: str, layout: Layout, links: Links) -> bool:
    """Whether ranks along an axis sit on different nodes: inner axes are neighbours (`flame.parallel.mesh.AXES`)."""
    reach = 1
    for name in reversed(AXES):
        reach *= getattr(layout, name)
        if name == axis:
            break
    return reach > links.node


def rank_traffic(
    stages: Sequence[LocalStage], job: JobConfig, layout: Layout, mesh: Mesh, count: int, links: Links
) -> list[Traffic]:
    """All that a rank with `stages` exchanges in a step of `count` micro-batches."""
    found = [*data_traffic(stages, job, layout, count), *layer_traffic(stages, job, layout, mesh, count)]
    found += pipeline_traffic(stages, job, layout, count)
    timed = []
    for axis, what, exchanges, sent in found:
        speed = links.outside if spans_nodes(axis.split(" x ")[0], layout, links) else links.inside
        ranks = 1
        for name in axis.split(" x "):
            ranks *= getattr(layout, name)
        if ranks > 1 and exchanges:
            timed.append(Traffic(axis, what, ranks, exchanges, sent, sent / speed + exchanges * links.latency))
    return timed


Entry = tuple[str, str, float, float]
"""Axis, what, exchanges, bytes sent."""
TOKENS = "gather and scatter tokens"


def data_traffic(stages: Sequence[LocalStage], job: JobConfig, layout: Layout, count: int) -> list[Entry]:
    """Weights gathered, gradients reduced over shards, and summed over replicas."""
    ranks, training = layout.dp_shard * layout.cp, job.training
    share = (ranks - 1) / ranks
    axis = "dp_shard x cp" if layout.cp > 1 else "dp_shard"
    entries: list[Entry] = []
    for stage in stages:
        inside = sum(held(block.parameters()) for block in stage.part.blocks)
        root, units = held(stage.part.parameters()) - inside, len(stage.part.blocks)
        blocks_times, root_times = float(count), float(count)
        if layout.pp > 1 and keeps_gathered(job, layout):
            blocks_times = root_times = 1.0
        elif not keeps_gathered(job, layout):
            blocks_times *= 2
            root_times *= 2 if job.parallelism.fsdp_reshard_after_forward == "always" else 1
        size = BYTES[training.mixed_precision_param] * share * (blocks_times * inside + root_times * root)
        entries.append((axis, "gather weights", blocks_times * units + root_times, size))
        times = count if job.parallelism.reduce_each_microbatch else 1
        size = BYTES[training.mixed_precision_reduce] * share * (inside + root) * times
        entries.append((axis, "reduce gradients", (units + 1) * times, size))
        shards = sum(shard_numel(local_shape(item), ranks) for item in stage.part.parameters())
        replicas = 2 * (layout.dp_replicate - 1) / layout.dp_replicate
        size = BYTES[training.mixed_precision_reduce] * replicas * shards
        entries.append(("dp_replicate", "sum gradients", units + 1, size))
    return merged(entries)


def layer_traffic(stages: Sequence[LocalStage], job: JobConfig, layout: Layout, mesh: Mesh, count: int) -> list[Entry]:
    """Exchanges inside the blocks, as counted in their forwards; backwards send as much, recomputation again."""
    tokens = microbatch_rows(job) * job.training.seq_len / layout.cp
    passes = (3 if job.activation_checkpoint.mode == "full" else 2) * count
    entries: list[Entry] = []
    for stage in stages:
        ends = stage.part.stage.is_first + stage.part.stage.is_last  # the embedding's output, and the head's input
        width = stage.part.config.hidden_size * BYTES[job.training.mixed_precision_param]
        sent = ends * tokens * width * (layout.tp - 1) / layout.tp
        entries.append(("tp", TOKENS, 2 * count * ends, 2 * count * sent))
        for axis, what in (("tp", TOKENS), ("cp", "states, halos, keys and values")):
            name = mesh.group(axis).group_name
            sent = sum(exchanges.sent.get(name, 0.0) for exchanges in stage.exchanges)
            times = sum(exchanges.count.get(name, 0) for exchanges in stage.exchanges)
            entries.append((axis, what, passes * times, passes * sent))
    return merged(entries)


def pipeline_traffic(stages: Sequence[LocalStage], job: JobConfig, layout: Layout, count: int) -> list[Entry]:
    """Activations to the next stage and gradients to the one before; and the gradient of a tied embedding."""
    rows, length = microbatch_rows(job), job.training.seq_len // layout.cp
    both = [boundary for stage in stages for boundary in (stage.received, stage.sent)]
    sent = sum(boundary.bytes(rows, length) for boundary in both)
    tensors = sum(len(boundary.entries) for boundary in both)
    entries: list[Entry] = [("pp", "activations and their gradients", count * tensors, float(count * sent))]
    for stage in stages:
        at_an_end = stage.part.stage.is_first or stage.part.stage.is_last
        if stage.part.config.tie_word_embeddings and at_an_end:
            weight = stage.part.decoder.embeddings._parameters["weight"]
            assert weight is not None
            size = FP32 * shard_numel(local_shape(weight), layout.dp_shard * layout.cp)
            entries.append(("pp", "gradient of the tied embedding", 1, float(size)))
    return entries


def merged(entries: list[Entry]) -> list[Entry]:
    """Entries of the same axis and kind together."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for axis, what, exchanges, sent in entries:
        before = sums.get((axis, what), (0.0, 0.0))
        sums[axis, what] = (before[0] + exchanges, before[1] + sent)
    return [(axis, what, *values) for (axis, what), values in sums.items()]


def bubble(job: JobConfig, layout: Layout, count: int) -> float | None:
    """Part of the pipeline's time in which a rank waits for its first micro-batch or after its last one; None where a
    schedule fills it with gradients of weights."""
    from flame.parallel.pipeline_split import schedule_kind

    name, kind = schedule_kind(job.parallelism.pipeline_parallel_schedule)
    if kind.splits_backward:
        return None
    each = job.parallelism.pipeline_parallel_stages_per_rank or (2 if kind.several else 1)
    return (layout.pp - 1) / (each * count + layout.pp - 1)
