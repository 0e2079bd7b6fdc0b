"""Steps replayed from a CUDA graph equal plain ones."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from flame.config import load_job
from flame.errors import ConfigError
from flame.graphed import GraphedStep
from flame.models.registry import resolve_config
from flame.optim.build import build_optimizer
from flame.parallel.mesh import Degrees, build_mesh
from flame.parallel.parallelize import build_sharded_model
from flame.step import FiniteGuard, StepOptions, TrainStep

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODELS = {
    "transformer": {"num_heads": 2},
    "gla": {"num_heads": 2},
    "mamba2": {"head_dim": 32, "num_heads": 4, "expand": 2},
}


@dataclass
class Rows:
    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: None = None
    max_seqlen: int | None = None
    shard: None = None


@pytest.fixture(scope="module", autouse=True)
def world():
    if torch.cuda.is_available():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()
    else:
        yield


def history(model_type, graphed, steps=8, accumulation=2):
    """Losses, norms and final weights of a short run whose fifth step sees a weight that is not finite."""
    values = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        **MODELS[model_type],
    }
    job = load_job(None, ["--model.tokenizer_path=bytes", "--training.steps=20", "--lr_scheduler.warmup_steps=2"])
    job.compile.enable = False
    device, mesh = torch.device("cuda"), build_mesh(Degrees(), "cuda", 1)
    model = build_sharded_model(resolve_config(values), job, mesh, device)
    guard = FiniteGuard("skip", device)
    step = TrainStep(model, build_optimizer(job, model), guard, mesh.loss_group, StepOptions(1.0))
    run, figures = (GraphedStep(step, device) if graphed else step), []
    for number in range(1, steps + 1):
        generator = torch.Generator().manual_seed(number)
        rows = [torch.randint(97, (2, 129), generator=generator).cuda() for _ in range(accumulation)]
        norm = getattr(model.decoder, model.decoder.names.final_norm).weight.detach().to_local()
        if number == 5:
            norm[0] = float("nan")
        result = run([Rows(each[:, :-1], each[:, 1:].contiguous()) for each in rows], number)
        if number == 5:
            norm[0] = 1.0
        figures.append(torch.stack([result.loss, result.grad_norm, result.learning_rate, result.tokens.float()]))
    weights = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    return torch.stack(figures), weights, guard.check()


@gpu
@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_replayed_steps_equal_plain_ones_and_skip_the_same_step(model_type):
    plain, plain_weights, plain_skipped = history(model_type, False)
    replayed, weights, skipped = history(model_type, True)
    torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert skipped == plain_skipped == 1
    for name, weight in plain_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="cuda_graph needs a GPU"):
        GraphedStep(None, torch.device("cpu"))


def test_packed_documents_are_refused_when_the_job_is_read():
    with pytest.raises(ConfigError, match="cuda_graph needs rows of one shape"):
        load_job(None, ["--compile.cuda_graph=true", "--training.varlen=true"])
