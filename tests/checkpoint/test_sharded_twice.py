"""Weights cut over two mesh dimensions are stored whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flame.checkpoint import CheckpointManager
from flame.config.sections import Checkpoint


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7))


def make_manager(model, folder):
    return CheckpointManager(Checkpoint(enable=True), Path(folder), {"model": model})


def save_cut_both_ways(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(make_model(), mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in model:
        fully_shard(layer, mesh=mesh["dp"])
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(number + 1)
    manager = make_manager(model, folder)
    manager.save(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert manager.load() == 1
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def load_whole(rank, folder):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    make_manager(model, folder).load()
    assert dist.get_world_size() == 1
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.distributed
def test_a_checkpoint_of_two_by_two_ranks_loads_there_and_on_one(tmp_path):
    expected = [parameter.detach() + (number + 1) for number, parameter in enumerate(make_model().parameters())]
    loaded = [*run_ranks(save_cut_both_ways, 4, tmp_path), *run_ranks(load_whole, 1, tmp_path)]
    for weights in loaded:
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
