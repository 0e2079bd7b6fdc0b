"""Sharded Muon orthogonalizes whole matrices, so it gives what one rank gives."""

import pytest
import torch
from ranks import run_ranks
from tiny import CONFIG, full_parameters, sharded_model

from flame.models.initialize import local_slice
from flame.optim.groups import parameter_groups, split_matrices
from flame.optim.muon import Muon, MuonOptions
from flame.parallel.mesh import Degrees

pytestmark = pytest.mark.distributed


def update(rank, degrees, world_size, width):
    # Rows of the MLP are uneven over data-parallel ranks, and there are more matrices than ranks.
    model, mesh = sharded_model(degrees, world_size, {**CONFIG, "vocab_size": 68, "intermediate_size": width})
    matrices, _ = split_matrices(parameter_groups(model, 0.1), ["model.layers."])
    muon = Muon(matrices, MuonOptions())
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for matrix in matrices[0].parameters.values():  # the same gradients everywhere, to the last bit
            gradient = torch.randn(matrix.shape, generator=generator)
            matrix.grad = torch.zeros_like(matrix)
            matrix.grad.to_local().copy_(local_slice(gradient, matrix))
        muon.step(torch.tensor(0.01), torch.tensor(True))
    return full_parameters(model)


LAYOUTS = [(Degrees(dp_shard=2), 2), (Degrees(dp_shard=4), 4), (Degrees(dp_replicate=2), 2)]
SPLIT = [(Degrees(tp=2), 2), (Degrees(dp_shard=2, tp=2), 4), (Degrees(dp_replicate=2, tp=2), 4)]


@pytest.mark.parametrize("layouts, width", [(LAYOUTS, 37), (SPLIT, 38)], ids=["data", "tensor"])
def test_sharded_updates_equal_those_of_one_rank(layouts, width):
    expected = run_ranks(update, 1, Degrees(), 1, width)[0]
    for degrees, world_size in layouts:
        for found in run_ranks(update, world_size, degrees, world_size, width):
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
