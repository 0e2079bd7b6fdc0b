"""A model whose rows are cut over ranks computes what one process computes: loss and every gradient."""

import traceback

import pytest
import torch
from ranks import run_ranks
from test_every_system import config
from test_tensor_parallel import stir
from tiny import LENGTH, packed_row, sharded_model

from flame.data.batch import Batch
from flame.models.registry import systems
from flame.parallel.mesh import Degrees

pytestmark = pytest.mark.distributed
NAMES = sorted(systems())
COMMON = ["gated_deltanet", "gla", "mamba2", "mom", "rwkv7", "transformer"]
GROUPS = {"common": COMMON, "others": [name for name in NAMES if name not in COMMON]}  # all with --run-slow
OPTIONS = {  # convolutions where they are optional, and heads for two ranks
    "gla": {"use_short_conv": True},
    "gsa": {"use_short_conv": True},
    "hgrn": {"use_short_conv": True},
    "rodimus": {"ska_attn": {"num_heads": 2}},
}


def job(name):
    values = {**config(name), "vocab_size": 68, **OPTIONS.get(name, {})}  # a multiple of tensor-parallel ranks
    return {**values, "attn": {"layers": [1], "num_heads": 2, "window_size": 7}} if name == "gla" else values


def batches():
    """Plain rows, and documents that cross ranks, end at their bounds or lie inside them."""
    pair = [packed_row(1), packed_row(2)]
    yield Batch(*(torch.cat([getattr(row, key) for row in pair]) for key in ("input_ids", "labels")))
    for bounds in [(0, LENGTH), (0, 5, 19, 20, LENGTH), (0, 2, 6, 12, 15, LENGTH)]:
        row = packed_row(len(bounds))
        yield Batch(row.input_ids, row.labels, torch.tensor(bounds, dtype=torch.int32))


def losses_and_gradients(rank, names, degrees, world_size):
    """By system: ([losses], gradients by parameter), or an error."""
    found = {}
    for name in names:
        try:
            model, mesh = sharded_model(degrees, world_size, job(name))
            stir(model)
            found[name] = run(model, mesh)
        except Exception:
            found[name] = traceback.format_exc()[-2500:]
    return found


def run(model, mesh):
    """Every data-parallel rank takes the same rows, so losses and gradients are as many times those of one."""
    losses = []
    for batch in batches():
        part = batch if mesh.degrees.cp == 1 else batch.part(mesh.group("cp"))
        loss = model(part.input_ids, labels=part.labels, cu_seqlens=part.cu_seqlens, shard=part.shard).loss_sum
        loss.backward()
        whole = loss.detach().clone() / mesh.data_size
        torch.distributed.all_reduce(whole, group=mesh.loss_group)
        losses.append(float(whole))
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return losses, {name: gradient.full_tensor() / mesh.data_size for name, gradient in named}


@pytest.fixture(scope="module")
def one_process():
    return {}


def assert_equal(name, found, expected):
    assert not isinstance(found, str), f"{name}: {found}"
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")
    assert found[1].keys() == expected[1].keys()
    for parameter, gradient in expected[1].items():
        scale = float(gradient.abs().max()) + 1e-3
        error = float((found[1][parameter] - gradient).abs().max()) / scale
        assert error < 1e-4, f"{name}: gradient of {parameter} differs by {error:.1e} of its largest entry"


def compare(group, degrees, one_process):
    names = GROUPS[group]
    if group not in one_process:
        one_process[group] = run_ranks(losses_and_gradients, 1, names, Degrees(), 1)[0]
    world_size = degrees.data * degrees.cp * degrees.tp
    for results in run_ranks(losses_and_gradients, world_size, names, degrees, world_size):
        for name in names:
            assert_equal(name, results[name], one_process[group][name])


LAYOUTS = {
    "cp_2": Degrees(cp=2),
    "cp_4": Degrees(cp=4),
    "dp_shard_2_cp_2": Degrees(dp_shard=2, cp=2),
    "dp_replicate_2_cp_2": Degrees(dp_replicate=2, cp=2),
    "cp_2_tp_2": Degrees(cp=2, tp=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_common_systems_compute_what_one_process_does(layout, one_process):
    compare("common", LAYOUTS[layout], one_process)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cp_2", "cp_4", "dp_shard_2_cp_2", "cp_2_tp_2"])
def test_all_systems_compute_what_one_process_does(layout, one_process):
    compare("others", LAYOUTS[layout], one_process)
