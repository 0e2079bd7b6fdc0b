"""Sharded Muon orthogonalizes whole matrices, so it gives what one rank gives."""

import pytest
import torch
from ranks import run_ranks
from tiny import CONFIG, full_parameters, sharded_model

from flame.optim.groups import parameter_groups, split_matrices
from flame.optim.muon import Muon, MuonOptions
from flame.parallel.mesh import Degrees

pytestmark = pytest.mark.distributed


def update(rank, degrees, world_size):
    # 37 rows of the gate are uneven over 2 and 4 ranks, and there are more matrices than ranks.
    model, mesh = sharded_model(degrees, world_size, {**CONFIG, "intermediate_size": 37})
    matrices, _ = split_matrices(parameter_groups(model, 0.1), ["model.layers."])
    muon = Muon(matrices, MuonOptions())
    tokens = torch.arange(48).view(2, 24) % CONFIG["vocab_size"]
    for _ in range(2):
        model(tokens, labels=tokens).loss_sum.div(48 * world_size).backward()
        muon.step(torch.tensor(0.01), torch.tensor(True))
        model.zero_grad()
    return full_parameters(model)


def test_sharded_updates_equal_those_of_one_rank():
    expected = run_ranks(update, 1, Degrees(), 1)[0]
    for degrees, world_size in [(Degrees(dp_shard=2), 2), (Degrees(dp_shard=4), 4), (Degrees(dp_replicate=2), 2)]:
        for found in run_ranks(update, world_size, degrees, world_size):
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)
