"""Every system trains in a pipeline as it does in one process: losses, gradients, gradient norms."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from ranks import run_ranks
from test_every_system import config
from tiny import LENGTH, Packed, micro_batches

from flame.config.sections import JobConfig
from flame.data import Batch
from flame.errors import ConfigError
from flame.models.decoder import build_model
from flame.models.registry import resolve_config, systems
from flame.optim.build import build_optimizer
from flame.parallel.mesh import build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.parallel.pipeline import build_pipeline
from flame.parallel.pipeline_split import stages_of_job
from flame.step import FiniteGuard, StepOptions, TrainStep

pytestmark = pytest.mark.distributed
ROWS = 4  # sequences in a global step
NAMES = sorted(systems())
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; `settings` are dotted keys of the job."""

    model: dict
    settings: dict = field(default_factory=dict)
    packed: bool = True
    rows: int = 1  # in a micro-batch
    steps: int = 1

    def job(self, **parallelism):
        job = JobConfig()
        job.training.mixed_precision_param = "float32"
        job.training.seq_len, job.training.global_batch_size = LENGTH, ROWS
        job.training.local_batch_size = job.parallelism.pipeline_parallel_microbatch_size = self.rows
        job.optimizer.eps, job.lr_scheduler.warmup_steps = 1e-4, 0
        job.compile.enable = False
        named = {f"parallelism.{key}": value for key, value in parallelism.items()}
        for key, value in {**self.settings, **named}.items():
            section, name = key.split(".")
            setattr(getattr(job, section), name, value)
        return job


def batches_of(case, step, mesh):
    rows = micro_batches(step, mesh.data_rank, mesh.data_size, ROWS)
    if mesh.degrees.cp > 1:
        return [Batch(row.input_ids, row.labels, row.cu_seqlens).part(mesh.group("cp")) for row in rows]
    if case.packed:
        return rows
    found = []
    for start in range(0, len(rows), case.rows):
        part = rows[start : start + case.rows]
        ids, labels = (torch.cat([getattr(row, key) for row in part]) for key in ("input_ids", "labels"))
        found.append(Packed(ids, labels, None))
    return found


def build(case, job, world_size):
    mesh = build_mesh(degrees_of(job), "cpu", world_size)
    make = build_pipeline if mesh.degrees.pp > 1 else build_sharded_model
    return make(resolve_config(case.model), job, mesh, CPU), mesh


def train(case, world_size, **parallelism):
    """[steps, 2] losses and gradient norms, this rank's gradients of the first step, its parameters after the last."""
    job = case.job(**parallelism)
    model, mesh = build(case, job, world_size)
    step = TrainStep(model, build_optimizer(job, model), FiniteGuard("skip", CPU), mesh.loss_group, StepOptions())
    gradients, update, history = {}, step.optimizer.step, []

    def capture(apply):
        if not gradients:
            named = {name: parameter.grad for name, parameter in model.named_parameters()}
            gradients.update({name: grad.full_tensor().clone() for name, grad in named.items() if grad is not None})
        return update(apply)

    step.optimizer.step = capture
    for index in range(case.steps):
        result = step(batches_of(case, index, mesh), index + 1)
        history.append([result.loss, result.grad_norm])
    parameters = {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}
    return torch.tensor(history), gradients, parameters


def train_all(rank, cases, world_size, parallelism):
    """Results by name of the case; an error instead where one fails."""
    found = {}
    for name, case in cases.items():
        try:
            found[name] = train(case, world_size, **parallelism)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def assert_same(found, expected, parameter_tolerance=1e-5):
    """Results of all ranks, which together have the layers of the whole model, against those of one process."""
    assert not isinstance(expected, str), expected
    together = set()
    for result in found:
        assert not isinstance(result, str), result
        torch.testing.assert_close(result[0], expected[0], rtol=1e-4, atol=1e-5)
        for name, gradient in result[1].items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-5, msg=name)
        for name, parameter in result[2].items():
            torch.testing.assert_close(parameter, expected[2][name], rtol=1e-4, atol=parameter_tolerance, msg=name)
        together |= result[1].keys()
    assert together == expected[1].keys()


def deep(name, layers=4, **values):
    return {**config(name), "num_hidden_layers": layers, "vocab_size": 68, **values}


SYSTEMS = {name: Case(deep(name, layers=3)) for name in NAMES}


@pytest.fixture(scope="module")
def system_runs():
    one = run_ranks(train_all, 1, SYSTEMS, 1, {})[0]
    return one, run_ranks(train_all, 2, SYSTEMS, 2, {"pipeline_parallel_degree": 2})


@pytest.mark.parametrize("name", NAMES)
def test_every_system_in_two_stages(name, system_runs):
    one, two = system_runs
    assert_same([result[name] for result in two], one[name])


TIED = {"tie_word_embeddings": True}
SCHEDULE = "parallelism.pipeline_parallel_schedule"
WAYS = {
    "three_steps": Case(deep("gla"), steps=3),
    "rows": Case(deep("transformer"), packed=False, rows=2, steps=2),
    "tied": Case(deep("gla", **TIED), steps=3),
    "muon": Case(deep("transformer"), {"optimizer.name": "Muon"}, steps=2),
    "attention_residuals": Case(deep("transformer", attnres_block_size=2)),
    "interleaved": Case(deep("transformer"), {SCHEDULE: "interleaved1f1b"}, steps=2),
    "interleaved_tied": Case(deep("hgrn2", **TIED), {SCHEDULE: "Interleaved1F1B"}, steps=2),
    "zbv": Case(deep("gla"), {SCHEDULE: "ZBVZeroBubble"}, steps=2),
}
SLOW_WAYS = {
    "recomputed": Case(deep("rwkv7"), {"activation_checkpoint.mode": "full"}),
    "recomputed_by_op": Case(deep("mom"), {"activation_checkpoint.mode": "selective"}),
    "resharded": Case(deep("gla"), {"parallelism.fsdp_reshard_after_forward": "always"}, steps=2),
    "offloaded": Case(deep("gla"), {"training.enable_cpu_offload": True}, steps=2),
    "gpipe": Case(deep("rwkv7"), {SCHEDULE: "GPipe"}),
    "interleaved_mom": Case(deep("mom"), {SCHEDULE: "Interleaved1F1B"}, steps=2),
    "interleaved_residuals": Case(deep("transformer", attnres_block_size=4), {SCHEDULE: "Interleaved1F1B"}),
    "looped": Case(deep("rwkv7"), {SCHEDULE: "LoopedBFS"}),
    "interleaved_zero_bubble": Case(deep("rwkv7"), {SCHEDULE: "InterleavedZeroBubble"}, steps=2),
    "zbv_rwkv7": Case(deep("rwkv7"), {SCHEDULE: "ZBVZeroBubble"}, steps=2),
    "zbv_mom": Case(deep("mom"), {SCHEDULE: "ZBVZeroBubble"}),
    "zbv_recomputed": Case(deep("gla"), {SCHEDULE: "ZBVZeroBubble", "activation_checkpoint.mode": "full"}),
    "dual_pipe": Case(deep("rwkv7"), {SCHEDULE: "DualPipeV"}, steps=2),
}
TOLERANCE = {"muon": 5e-5}  # its Newton-Schulz iterations round to bf16


def without_schedule(case):
    return replace(case, settings={key: value for key, value in case.settings.items() if key != SCHEDULE})


@pytest.fixture(scope="module")
def ways(request):
    return {**WAYS, **(SLOW_WAYS if request.config.getoption("--run-slow") else {})}


@pytest.fixture(scope="module")
def ways_of_one(ways):
    return run_ranks(train_all, 1, {name: without_schedule(case) for name, case in ways.items()}, 1, {})[0]


@pytest.fixture(scope="module")
def ways_of_two(ways):
    return run_ranks(train_all, 2, ways, 2, {"pipeline_parallel_degree": 2})


@pytest.mark.parametrize("name", [*WAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_WAYS)])
def test_schedules_and_options_change_nothing(name, ways_of_one, ways_of_two):
    assert_same([result[name] for result in ways_of_two], ways_of_one[name], TOLERANCE.get(name, 1e-5))


def test_together_with_sharded_data(ways_of_one):
    cases = {key: WAYS[key] for key in ("three_steps", "tied", "interleaved")}
    found = run_ranks(train_all, 4, cases, 4, {"pipeline_parallel_degree": 2})
    for key in cases:
        assert_same([result[key] for result in found], ways_of_one[key])


MANY = ("rows", "dual_pipe")  # need more micro-batches than half a step, or four stages, leave
LAYOUTS = {
    "sharded": {"pipeline_parallel_degree": 2},
    "replicated": {"pipeline_parallel_degree": 2, "data_parallel_replicate_degree": 2},
    "four_stages": {"pipeline_parallel_degree": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_four_ranks(layout, ways, ways_of_one):
    cases = {key: case for key, case in ways.items() if key not in MANY}
    if layout == "four_stages":  # of one layer each
        cases = {key: case for key, case in cases.items() if SCHEDULE not in case.settings}
    found = run_ranks(train_all, 4, cases, 4, LAYOUTS[layout])
    for key in cases:
        assert_same([result[key] for result in found], ways_of_one[key], TOLERANCE.get(key, 1e-5))


ACROSS = {  # tensors of every kind travel: heads' values, routers' sums, sources, fp32 streams, gradients of a tied embedding
    **{name: Case(deep(name)) for name in ("gla", "transformer", "rwkv7", "mom", "mamba2", "hgrn", "gated_deltanet")},
    "sources": Case(deep("transformer", attnres_block_size=2)),
    "tied": Case(deep("gla", **TIED), steps=2),
    "interleaved": Case(deep("rwkv7"), {SCHEDULE: "Interleaved1F1B"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor_parallel_degree", "context_parallel_degree"])
def test_together_with_other_axes(axis):
    one = run_ranks(train_all, 1, {name: without_schedule(case) for name, case in ACROSS.items()}, 1, {})[0]
    found = run_ranks(train_all, 4, ACROSS, 4, {"pipeline_parallel_degree": 2, axis: 2})
    for name in ACROSS:
        assert_same([result[name] for result in found], one[name])


@pytest.mark.slow
def test_every_system_with_sharded_data(system_runs):
    found = run_ranks(train_all, 4, SYSTEMS, 4, {"pipeline_parallel_degree": 2})
    for name in NAMES:
        assert_same([result[name] for result in found], system_runs[0][name])


IMPOSSIBLE = {
    "3 stages, and the model has 2 layers": (deep("gla", 2), {"pipeline_parallel_degree": 3}),
    "makes 4 stages": (deep("gla", 3), {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "LoopedBFS"}),
    "did you mean '1F1B'": (deep("gla"), {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F1"}),
    "has one stage on a rank": (deep("gla"), {"pipeline_parallel_degree": 2, "pipeline_parallel_stages_per_rank": 2}),
    "gets 2 micro-batches": (deep("gla", 3), {"pipeline_parallel_degree": 3, "pipeline_parallel_microbatch_size": 2}),
    "tied embedding": (
        deep("gla", **TIED),
        {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
    ),
    "reduces gradients once": (deep("gla"), {"pipeline_parallel_degree": 2, "reduce_each_microbatch": True}),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_cannot_be_is_refused_before_anything_is_allocated(message):
    model, settings = IMPOSSIBLE[message]
    job = Case(model).job(**settings)
    with torch.device("meta"):
        whole = build_model(model)
    count = ROWS // job.parallelism.pipeline_parallel_microbatch_size
    with pytest.raises(ConfigError, match=message):
        stages_of_job(whole, job, settings["pipeline_parallel_degree"], count)


def initial_weights(rank, model, parallelism, world_size):
    case = Case(model)
    built, _ = build(case, case.job(**parallelism), world_size)
    return {name: parameter.detach().full_tensor() for name, parameter in built.named_parameters()}


def test_initial_weights_are_bitwise_those_of_one_process():
    model = deep("hgrn", **TIED)
    expected = run_ranks(initial_weights, 1, model, {}, 1)[0]
    parts = run_ranks(initial_weights, 2, model, {"pipeline_parallel_degree": 2}, 2)
    assert parts[0].keys() | parts[1].keys() == expected.keys()
    assert parts[0].keys() & parts[1].keys() == {"model.embeddings.weight"}
    assert all(torch.equal(weight, expected[name]) for part in parts for name, weight in part.items())
