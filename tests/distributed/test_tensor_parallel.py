"""A model split over tensor-parallel ranks computes what one process computes: loss and every gradient."""

import pytest
import torch
from ranks import run_ranks
from test_every_system import config
from tiny import packed_row

from flame.models.decoder import build_model
from flame.models.initialize import initialize_weights
from flame.models.registry import systems
from flame.parallel.fsdp import ShardingOptions, apply_fsdp
from flame.parallel.mesh import Degrees, build_mesh
from flame.parallel.tensor import apply_tensor_parallel

pytestmark = pytest.mark.distributed
WORDS = 68  # a multiple of two ranks


def built(values, degrees, world_size):
    """A sharded model with initial weights, and its mesh."""
    with torch.device("meta"):
        model = build_model(values)
    mesh = build_mesh(degrees, "cpu", world_size)
    if degrees.tp > 1:
        apply_tensor_parallel(model, mesh.axis("tp"))
    apply_fsdp(model, list(model.blocks), mesh.fsdp, ShardingOptions(param_dtype=torch.float32))
    model.to_empty(device="cpu")
    initialize_weights(model, seed=1)
    return model, mesh


@torch.no_grad()
def stir(model):
    """Weights away from the zeros and ones at which many start, which would hide gradients."""
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        from flame.models.initialize import local_slice

        parameter.to_local().add_(local_slice(noise, parameter))


def losses_and_gradients(rank, jobs, degrees, world_size):
    """By name: ([losses], gradients by parameter), or an error."""
    torch.manual_seed(0)
    found = {}
    for name, values in jobs.items():
        try:
            model, mesh = built(values, degrees, world_size)
            stir(model)
            found[name] = run(model, mesh)
        except Exception as error:
            import traceback

            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    return found


def run(model, mesh):
    """Two rows without documents and a packed one (an odd number of tokens), accumulated."""
    row = packed_row(3)
    pair = [packed_row(1), packed_row(2)]
    batches = [
        (torch.cat([p.input_ids for p in pair]), torch.cat([p.labels for p in pair]), None),
        (row.input_ids[:, :-1], row.labels[:, :-1], row.cu_seqlens.clamp(max=row.input_ids.shape[1] - 1)),
    ]
    losses = []
    for ids, labels, cu_seqlens in batches:
        loss = model(ids, labels=labels, cu_seqlens=cu_seqlens).loss_sum / mesh.data_size
        loss.backward()
        losses.append(loss.item() * mesh.data_size)
    gradients = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = model(batches[0][0]).logits
    return losses, gradients, logits


JOBS = {name: {**config(name), "vocab_size": WORDS} for name in sorted(systems())}
ONE = sorted(JOBS)


def assert_same(found, expected):
    assert not isinstance(expected, str), expected
    assert not isinstance(found, str), found
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-3)
        error = (found[1][name] - gradient).abs().max() / scale
        assert error < 1e-4, f"{name}: {error:.2e} of its largest entry {scale:.2e}"


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(losses_and_gradients, 1, {n: JOBS[n] for n in ONE}, Degrees(), 1)[0]


@pytest.fixture(scope="module")
def split_in_two():
    return run_ranks(losses_and_gradients, 2, {n: JOBS[n] for n in ONE}, Degrees(tp=2), 2)


@pytest.mark.parametrize("name", ONE)
def test_equals_one_process(name, split_in_two, one_rank):
    for found in split_in_two:
        assert_same(found[name], one_rank[name])
