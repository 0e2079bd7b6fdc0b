"""Every system trains in a pipeline as it does in one process: losses, gradients, gradient norms."""

import pytest
import torch
from ranks import run_ranks
from test_every_system import config
from tiny import LENGTH, micro_batches

from flame.config.sections import JobConfig
from flame.models.registry import resolve_config
from flame.optim.adamw import AdamW, AdamWOptions
from flame.optim.groups import parameter_groups
from flame.optim.optimizer import Optimizer
from flame.optim.schedules import LearningRate, Schedule
from flame.parallel.mesh import build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.parallel.pipeline import build_pipeline
from flame.step import FiniteGuard, StepOptions, TrainStep

pytestmark = pytest.mark.distributed
ROWS, STEPS, LAYERS = 4, 2, 4  # sequences in a global step


def make_job(pp=1, replicate=1, **parallelism):
    job = JobConfig()
    job.training.mixed_precision_param = "float32"
    job.training.seq_len, job.training.global_batch_size = LENGTH, ROWS
    job.parallelism.pipeline_parallel_degree = pp
    job.parallelism.data_parallel_replicate_degree = replicate
    for key, value in parallelism.items():
        setattr(job.parallelism, key, value)
    job.compile.enable = False
    return job


def make_step(job, values, world_size):
    mesh = build_mesh(degrees_of(job), "cpu", world_size)
    build = build_pipeline if mesh.degrees.pp > 1 else build_sharded_model
    model = build(resolve_config(values), job, mesh, torch.device("cpu"))
    rule = AdamW(parameter_groups(model, 0.1), AdamWOptions(eps=1e-4))
    optimizer = Optimizer({"adamw": rule}, LearningRate(Schedule(20), 1e-2, torch.device("cpu")))
    guard = FiniteGuard("skip", torch.device("cpu"))
    return TrainStep(model, optimizer, guard, mesh.loss_group, StepOptions()), mesh


def train(job, values, world_size, packed=True):
    """[steps, 2] losses and gradient norms, and this rank's gradients of the first step."""
    step, mesh = make_step(job, values, world_size)
    gradients, update = {}, step.optimizer.step

    def capture(apply):
        if not gradients:
            named = [(name, p.grad) for name, p in step.model.named_parameters() if p.grad is not None]
            gradients.update({name: gradient.full_tensor().clone() for name, gradient in named})
        return update(apply)

    step.optimizer.step = capture
    history = []
    for index in range(STEPS):
        batches = micro_batches(index, mesh.data_rank, mesh.data_size, ROWS)
        if not packed:
            for batch in batches:
                batch.cu_seqlens = None
        result = step(batches, index + 1)
        history.append([result.loss, result.grad_norm])
    return torch.tensor(history), gradients


def runs(rank, jobs, world_size):
    found = {}
    for key, (job, values, packed) in jobs.items():
        try:
            found[key] = train(job, values, world_size, packed)
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"
    return found


def assert_same(found, expected):
    """`found` by rank: gradients of their own layers, which together are those of the whole model."""
    together = {}
    for result in found:
        assert not isinstance(result, str), result
        torch.testing.assert_close(result[0], expected[0], rtol=1e-4, atol=1e-5)
        together |= result[1]
        for name, gradient in result[1].items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert together.keys() == expected[1].keys()


def deep(name):
    return {**config(name), "num_hidden_layers": LAYERS}


def test_quick():
    jobs = lambda **kw: {name: (make_job(**kw), deep(name), True) for name in ("gla", "transformer")}
    expected = run_ranks(runs, 1, jobs(), 1)[0]
    found = run_ranks(runs, 2, jobs(pp=2), 2)
    for name in expected:
        assert_same([ranks[name] for ranks in found], expected[name])
