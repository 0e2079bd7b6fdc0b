"""Which layers a pipeline stage has, and which rank has which stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from flame.config.sections import JobConfig
from flame.errors import ConfigError, unknown_name
from flame.models.decoder import CausalLM


@dataclass(frozen=True)
class ScheduleKind:
    """What a schedule of torch.distributed.pipelining asks of the stages.

    Attributes:
        several: a rank has several stages (else one).
        folded: the second half of the stages goes back over the ranks, so that the first rank has the last stage too.
        splits_backward: gradients of inputs and of weights are computed at different times.
        fills: it needs as many micro-batches as stages.
        in_rounds: micro-batches go in rounds of equal size, of at least as many as there are ranks.
    """

    several: bool = False
    folded: bool = False
    splits_backward: bool = False
    fills: bool = False
    in_rounds: bool = False


SCHEDULES = {
    "GPipe": ScheduleKind(),
    "1F1B": ScheduleKind(fills=True),
    "LoopedBFS": ScheduleKind(several=True),
    "Interleaved1F1B": ScheduleKind(several=True, in_rounds=True),
    "InterleavedZeroBubble": ScheduleKind(several=True, splits_backward=True, in_rounds=True),
    "ZBVZeroBubble": ScheduleKind(several=True, folded=True, splits_backward=True),
    "DualPipeV": ScheduleKind(several=True, folded=True, splits_backward=True, fills=True),
}


def schedule_kind(name: str) -> tuple[str, ScheduleKind]:
    """The schedule called `name` in any case, under the name that torch has for it."""
    found = next((known for known in SCHEDULES if known.lower() == name.lower()), None)
    if found is None:
        text = unknown_name("schedule", name, SCHEDULES)
        raise ConfigError(f"parallelism.pipeline_parallel_schedule: {text}")
    return found, SCHEDULES[found]


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `last` - 1 of the model, on rank `rank` of the pipeline."""

    index: int
    count: int
    first: int
    last: int
    rank: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def stages_of_job(model: CausalLM, job: JobConfig, ranks: int, micro_batches: int) -> list[Stage]:
    """The stages that a job cuts its model into, on `ranks` ranks.

    Args:
        model: the whole model, on the meta device.
        micro_batches: that go through the pipeline in a step.

    Raises:
        ConfigError: the schedule is unknown, or asks for what the job or the model has not.
    """
    section = job.parallelism
    name, kind = schedule_kind(section.pipeline_parallel_schedule)
    each = section.pipeline_parallel_stages_per_rank or (2 if kind.several else 1)
    key = "parallelism.pipeline_parallel_stages_per_rank"
    if each > 1 and not kind.several:
        several = ", ".join(name for name, kind in SCHEDULES.items() if kind.several)
        raise ConfigError(
            f"{key} = {each}: the schedule {name} has one stage on a rank; those with several are {several}."
        )
    if kind.folded and each != 2:
        raise ConfigError(f"{key} = {each}: the schedule {name} has two stages on a rank.")
    if kind.folded and model.config.tie_word_embeddings:
        raise ConfigError(
            f"parallelism.pipeline_parallel_schedule = {name!r} puts the first and the last stage on one rank, which a "
            f"tied embedding (model.tie_word_embeddings) does not allow. Use Interleaved1F1B."
        )
    if section.reduce_each_microbatch:
        raise ConfigError(
            "parallelism.reduce_each_microbatch cannot be combined with a pipeline, which reduces gradients once a step."
        )
    if kind.splits_backward and job.compile.enable is True:
        raise ConfigError(
            f"compile.enable: the schedule {name} computes gradients of inputs and of weights apart, which compiled blocks "
            f"do not allow. Set it to false, or take another schedule."
        )
    stages = split_stages(model, job.training.seq_len, ranks, each, kind.folded)
    check_micro_batches(name, kind, ranks, len(stages), micro_batches)
    return stages


def check_micro_batches(name: str, kind: ScheduleKind, ranks: int, stages: int, count: int) -> None:
    """Raise ConfigError when the schedule cannot work on `count` micro-batches."""
    rounds, problem = max(1, count // ranks), ""
    if kind.fills and count < stages:
        problem = f"it needs at least {stages}, one for each stage"
    elif kind.in_rounds and count % rounds:
        problem = f"it makes {rounds} rounds of them, which must be equal; {rounds * ranks} would do"
    if problem:
        raise ConfigError(
            f"the schedule {name} gets {count} micro-batches a step, and {problem}. Their number is global_batch_size / "
            f"(data-parallel ranks x parallelism.pipeline_parallel_microbatch_size)."
        )


def split_stages(model: CausalLM, seq_len: int, ranks: int, stages_per_rank: int, folded: bool) -> list[Stage]:
    """The stages of a model, cut where the slowest of them is fastest.

    Args:
        model: the whole model, on the meta device.
        seq_len: length that the mixers' own cost is counted at.
        ranks: pipeline parallel degree.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    costs, count = layer_costs(model, seq_len), ranks * stages_per_rank
    if count > len(costs):
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree = {ranks} with {stages_per_rank} stages on a rank makes {count} stages, "
            f"and the model has {len(costs)} layers. A stage needs a layer: lower the degree or "
            f"pipeline_parallel_stages_per_rank."
        )
    head = 0.0 if model.lm_head is None else 2.0 * model.lm_head.weight.numel()
    cuts = balanced_cuts(costs, count, head)
    bounds = list(zip([0, *cuts], [*cuts, len(costs)]))
    return [Stage(i, count, first, last, stage_rank(i, ranks, folded)) for i, (first, last) in enumerate(bounds)]


def stage_rank(index: int, ranks: int, folded: bool) -> int:
    """The rank of a stage: around and around, or back and forth."""
    lap, place = divmod(index, ranks)
    return ranks - 1 - place if folded and lap % 2 else place


def layer_costs(model: CausalLM, seq_len: int) -> list[float]:
    """Forward operations a token of every block: its matrices and its mixer's own arithmetic."""
    costs = []
    for block in model.blocks:
        matrices = {id(part.weight): part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear)}
        costs.append(2.0 * sum(matrices.values()) + block.token_mixer.flops(seq_len))
    return costs


def balanced_cuts(costs: Sequence[float], count: int, head: float = 0.0) -> list[int]:
    """Where `count` runs of consecutive layers begin, but the first: the most expensive run is as cheap as can be, and
    among such cuts the runs are as equal as can be.

    Args:
        head: cost beside the layers, in the last run.
    """
    layers = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def run_cost(first: int, last: int) -> float:
        return sums[last] - sums[first] + (head if last == layers else 0.0)

    # best[n][e]: (most expensive run, sum of squares, start of the last run) of the first e layers in n + 1 runs.
    best = [[(run_cost(0, end), run_cost(0, end) ** 2, 0) for end in range(layers + 1)]]
    for runs in range(1, count):
        row = [(float("inf"), float("inf"), 0)] * (layers + 1)
        for end in range(runs + 1, layers + 1):
            for start in range(runs, end):
                cost, (most, squares, _) = run_cost(start, end), best[-1][start]
                row[end] = min(row[end], (max(most, cost), squares + cost**2, start))
        best.append(row)
    cuts, end = [], layers
    for runs in range(count - 1, 0, -1):
        end = best[runs][end][2]
        cuts.append(end)
    return cuts[::-1]
