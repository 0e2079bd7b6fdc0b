"""Whole jobs under tensor parallelism: same losses, samples and weights as one process, whatever layout they resume on."""

import re

import pytest
import torch
from jobs import JOB, Run, write_job
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
TEXT = JOB.replace('model_type = "transformer"', 'model_type = "gla"\nuse_short_conv = true\nvocab_size = 260').replace(
    "warmup_steps = 3", "warmup_steps = 3\ntotal_steps = 12"
)
TP = ["--parallelism.tensor_parallel_degree", 2, "--parallelism.data_parallel_shard_degree", 1]
PROMPT = ["--generation.prompts", '["the quick"]', "--generation.max_new_tokens", 8, "--generation.temperature", 0.0]


def run(folder, world_size, *arguments):
    started = Run(folder, [folder / "job.toml", *PROMPT, *arguments], world_size)
    assert started.wait(120) == [0] * world_size, started.text() + started.text(world_size - 1)
    return started.text()


def figures(log):
    """(step, loss, gradient norm) and validation losses, as logged."""
    steps = re.findall(r"step: +(\d+)  loss: +([\d.]+)  grad_norm: +([\d.]+)", log)
    return [tuple(map(float, each)) for each in steps], re.findall(r"validation: ([\d.]+)", log)


def sample(log):
    return re.search(r"Sample: (.*)", log).group(1)


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
    return run(folder, 1), load_file(folder / "run/hf/model.safetensors")


LAYOUTS = {"tensor": (2, TP), "data": (2, [])}


@pytest.mark.parametrize("first, then", [("data", "tensor"), pytest.param("tensor", "data", marks=pytest.mark.slow)])
def test_a_job_moves_between_tensor_and_data_parallel_ranks(first, then, job, alone):
    folder = job(f"{first}_{then}")
    log = run(folder, LAYOUTS[first][0], *LAYOUTS[first][1], "--training.steps", 6)
    log += run(folder, LAYOUTS[then][0], *LAYOUTS[then][1])
    expected, weights = alone
    assert "Resumed from step 6" in log
    steps, validations = figures(log)
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(figures(expected)[0]), rtol=1e-3, atol=1e-3)
    assert float(validations[-1]) == pytest.approx(float(figures(expected)[1][-1]), rel=1e-3)
    assert sample(log.split("Resumed")[1]) == sample(expected)
    exported = load_file(folder / "run/hf/model.safetensors")
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(exported[name].float(), weight.float(), rtol=1e-2, atol=1e-3, msg=name)


PIPELINE = ["--parallelism.pipeline_parallel_degree", 2, "--parallelism.data_parallel_shard_degree", 1]
CONTEXT = ["--parallelism.context_parallel_degree", 2, "--parallelism.data_parallel_shard_degree", 1]


@pytest.mark.slow
@pytest.mark.parametrize("beside", [PIPELINE, CONTEXT], ids=["pipeline", "context"])
def test_a_job_with_another_axis_beside_has_the_same_losses(beside, job, alone):
    degree = ["--parallelism.tensor_parallel_degree", 2]
    log = run(job("beside"), 4, *degree, *beside, "--training.steps", 4)
    expected = figures(alone[0])[0][:4]
    torch.testing.assert_close(torch.tensor(figures(log)[0]), torch.tensor(expected), rtol=1e-3, atol=1e-3)
