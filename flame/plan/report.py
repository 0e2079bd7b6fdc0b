"""A plan as text."""

from __future__ import annotations

from flame.optim.groups import describe_groups
from flame.plan import Plan
from flame.plan.memory import Memory
from flame.plan.parameters import Parameters


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
                ("micro-batches per step and rank", f"{plan.micro_batches:,}"),
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
        *pipeline_rows(plan),
        "",
        "Time of a step, if nothing overlaps",
        *table(time_rows(plan)),
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
        "gathered": "gathered weights",
        "accumulated": "gradients not yet reduced",
        "activations": "activations",
        "recomputed": "one block's backward",
        "loss": "loss",
        "buffers": "pipeline buffers",
    }
    rows = [(text, gibibytes(getattr(memory, name))) for name, text in names.items() if getattr(memory, name)]
    if memory.offloaded:
        rows.append(("of these in host memory", gibibytes(memory.offloaded)))
    return [*rows, ("most at a time on the device", gibibytes(memory.device))]


def pipeline_rows(plan: Plan) -> list[str]:
    """Memory of every rank of a pipeline, with its layers."""
    if plan.layout.pp == 1:
        return []
    rows = [
        (f"pipeline rank {rank}, layers {layers}", gibibytes(size))
        for rank, (layers, size) in enumerate(zip(plan.layers_by_rank, plan.memory_by_rank))
    ]
    return ["", "Memory by rank of the pipeline", *table(rows)]


def time_rows(plan: Plan) -> list[tuple[str, str]]:
    """Computation and exchanges of the rank that exchanges most."""
    links, rows = plan.links, []
    rows.append((f"compute, at {links.flops / 1e12:.0f} TFLOP/s", f"{plan.compute_seconds:9.4f} s"))
    for entry in plan.traffic:
        amount = f"{entry.sent / 1e9:9.3f} GB sent in {entry.exchanges:,.0f} exchanges of {entry.ranks} ranks"
        rows.append((f"{entry.axis}: {entry.what}", f"{entry.seconds:9.4f} s  {amount}"))
    if plan.bubble:
        rows.append(("pp: waiting at both ends of the step", f"{100 * plan.bubble:8.1f}%  of its time"))
    speeds = f"{links.inside / 1e9:.0f} GB/s within {links.node} ranks, {links.outside / 1e9:.0f} GB/s beyond"
    return [*rows, ("a rank sends", speeds)] if plan.traffic else rows


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
