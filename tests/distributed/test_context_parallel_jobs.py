"""Whole jobs under context parallelism: same losses and weights as one process, whatever layout they resume on."""

import re

import pytest
import torch
from jobs import JOB, Run, write_job
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
MODEL = """model_type = "gla"
use_short_conv = true
attn = {{layers = [1], num_heads = 2}}"""
TEXT = JOB.replace('model_type = "transformer"', MODEL).replace(
    "warmup_steps = 3", "warmup_steps = 3\ntotal_steps = 12"
)
ALONE = ["--parallelism.data_parallel_shard_degree", 1]
LAYOUTS = {
    "data": (2, []),
    "context": (2, [*ALONE, "--parallelism.context_parallel_degree", 2]),
    "context_tensor": (
        4,
        [*ALONE, "--parallelism.context_parallel_degree", 2, "--parallelism.tensor_parallel_degree", 2],
    ),
    "context_pipeline": (
        4,
        [*ALONE, "--parallelism.context_parallel_degree", 2, "--parallelism.pipeline_parallel_degree", 2],
    ),
}


def run(folder, layout, *arguments):
    world_size, degrees = LAYOUTS.get(layout, (1, []))
    started = Run(folder, [folder / "job.toml", *degrees, *arguments], world_size)
    assert started.wait(150) == [0] * world_size, started.text() + started.text(world_size - 1)
    return started.text()


def figures(log):
    """(step, loss, gradient norm), and validation losses, as logged."""
    steps = re.findall(r"step: +(\d+)  loss: +([\d.]+)  grad_norm: +([\d.]+)", log)
    validations = re.findall(r"validation: ([\d.]+)", log)
    return torch.tensor([tuple(map(float, each)) for each in steps]), torch.tensor(list(map(float, validations)))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    def fresh(name):
        folder = tmp_path_factory.mktemp(name)
        write_job(folder, TEXT)
        return folder

    return fresh


@pytest.fixture(scope="module")
def alone(job):
    folder = job("alone")
    return run(folder, "alone"), load_file(folder / "run/hf/model.safetensors")


@pytest.mark.parametrize(
    "first, then",
    [
        ("context", "data"),
        pytest.param("data", "context", marks=pytest.mark.slow),
        pytest.param("context", "context_tensor", marks=pytest.mark.slow),
        pytest.param("context_pipeline", "context", marks=pytest.mark.slow),
    ],
)
def test_a_job_moves_between_layouts(first, then, job, alone):
    folder = job(f"{first}_{then}")
    log = run(folder, first, "--training.steps", 6) + run(folder, then)
    assert "Resumed from step 6" in log
    expected, weights = alone
    steps, validations = figures(log)
    torch.testing.assert_close(steps, figures(expected)[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(validations[-1], figures(expected)[1][-1], rtol=1e-3, atol=1e-3)
    exported = load_file(folder / "run/hf/model.safetensors")
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(exported[name].float(), weight.float(), rtol=1e-2, atol=2e-3, msg=name)
