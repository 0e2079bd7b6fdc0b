import pytest

from flame.errors import ConfigError
from flame.parallel.mesh import Degrees, resolve_degrees


def test_minus_one_takes_what_the_other_axes_leave():
    assert resolve_degrees(Degrees(dp_replicate=2, dp_shard=-1, tp=4), 32) == Degrees(dp_replicate=2, dp_shard=4, tp=4)


@pytest.mark.parametrize(
    "degrees, world_size, text",
    [
        (Degrees(dp_shard=3), 4, "makes 3 ranks and there are 4"),
        (Degrees(dp_replicate=3, dp_shard=-1), 4, "4 ranks cannot be divided"),
        (Degrees(dp_shard=0), 4, "data_parallel_shard_degree = 0 must be at least 1, or -1"),
        (Degrees(tp=-1), 4, "tensor_parallel_degree = -1 must be at least 1"),
    ],
)
def test_impossible_degrees_are_refused_by_name(degrees, world_size, text):
    with pytest.raises(ConfigError, match=text):
        resolve_degrees(degrees, world_size)
