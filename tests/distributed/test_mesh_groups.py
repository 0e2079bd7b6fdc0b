"""Which ranks meet in which group, on grids that use several axes."""

import pytest
import torch.distributed as dist
from ranks import run_ranks

from flame.parallel.mesh import AXES, Degrees, build_mesh

pytestmark = pytest.mark.distributed


def peers(rank, degrees):
    mesh = build_mesh(degrees, "cpu", 4)
    groups = {axis: mesh.group(axis) for axis in AXES}
    groups |= {"data": mesh.data_group, "loss": mesh.loss_group, "shard": mesh.fsdp.get_group(mesh.fsdp.ndim - 1)}
    assert {id(group) for group in groups.values()} <= {id(group) for group in mesh.groups()}
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}, mesh.data_rank


GRIDS = {  # peers of rank 3 on the axes that are longer than one, and its data rank
    Degrees(dp_shard=2, tp=2): ({"dp_shard": [1, 3], "tp": [2, 3], "data": [1, 3], "loss": [1, 3], "shard": [1, 3]}, 1),
    Degrees(dp_shard=2, cp=2): ({"dp_shard": [1, 3], "cp": [2, 3], "data": [1, 3], "loss": [0, 1, 2, 3],
                                 "shard": [0, 1, 2, 3]}, 1),
    Degrees(dp_replicate=2, dp_shard=2): ({"dp_replicate": [1, 3], "dp_shard": [2, 3], "data": [0, 1, 2, 3],
                                           "loss": [0, 1, 2, 3], "shard": [2, 3]}, 3),
    Degrees(dp_replicate=2, cp=2): ({"dp_replicate": [1, 3], "cp": [2, 3], "data": [1, 3], "loss": [0, 1, 2, 3],
                                     "shard": [2, 3]}, 1),
    Degrees(pp=2, tp=2): ({"pp": [1, 3], "tp": [2, 3]}, 0),
    Degrees(pp=2, cp=2): ({"pp": [1, 3], "cp": [2, 3], "loss": [2, 3], "shard": [2, 3]}, 0),
}  # fmt: skip


@pytest.mark.parametrize("degrees", GRIDS, ids=str)
def test_groups_hold_the_peers_of_their_axes(degrees):
    expected, data_rank = GRIDS[degrees]
    found, rank = run_ranks(peers, 4, degrees)[3]
    assert found == {name: expected.get(name, [3]) for name in found}
    assert rank == data_rank
