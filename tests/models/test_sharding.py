"""Plans deal every row of a weight to the ranks that work on it, and refuse what cannot be dealt."""

import pytest
import torch

from flame.errors import ConfigError, FlameError
from flame.models.mixers.base import config_of_share
from flame.models.mixers.gated_deltanet import GatedDeltaNet
from flame.models.mixers.mamba2 import Mamba2
from flame.models.mixers.transformer import Attention
from flame.models.modules import Embedding
from flame.models.sharding import Split, deal_rows, shared_per_rank, whole_per_rank

SPLITS = {
    "heads": (Split(((12, 6),)), 3),
    "shared heads": (Split(((12, 2),)), 4),
    "parts": (Split(((8, 4), (8, 4), (6, 1), (2, 2))), 2),
}


@pytest.mark.parametrize("name", SPLITS)
def test_exchanged_rows_are_the_wanted_ones(name):
    split, ranks = SPLITS[name]
    whole = torch.arange(split.rows)
    stored = whole.chunk(ranks)
    deals = [deal_rows(split, ranks, rank) for rank in range(ranks)]
    for receiver in range(ranks):
        arrived = []
        for sender, deal in enumerate(deals):
            outgoing = torch.cat([stored[sender][start:stop] for start, stop in deal.sent]).split(deal.sends)
            assert len(outgoing[receiver]) == deals[receiver].receives[sender]
            arrived.append(outgoing[receiver])
        wanted = [whole[start:stop] for start, stop in split.wanted(ranks, receiver)]
        assert torch.equal(torch.cat(arrived), torch.cat(wanted))


def test_every_row_is_wanted_by_some_rank():
    for split, ranks in SPLITS.values():
        wanted = {
            row for rank in range(ranks) for start, stop in split.wanted(ranks, rank) for row in range(start, stop)
        }
        assert wanted == set(range(split.rows))


def test_heads_that_cannot_be_dealt_are_refused_with_a_way_out():
    assert whole_per_rank(8, 4, "num_heads") == 2 and shared_per_rank(2, 4, "num_kv_heads") == 1
    with pytest.raises(ConfigError, match=r"tensor_parallel_degree = 4 does not divide num_heads = 6.*\(1, 2, 3\)"):
        Attention(hidden_size=48, num_heads=6).tensor_parallel_plan(4)
    with pytest.raises(ConfigError, match="does not divide num_kv_heads = 3"):
        Attention(hidden_size=96, num_heads=6, num_kv_heads=3).tensor_parallel_plan(2)
    with pytest.raises(ConfigError, match="does not divide num_heads = 3"):
        GatedDeltaNet(hidden_size=32, num_heads=3, head_dim=8).tensor_parallel_plan(2)
    with pytest.raises(ConfigError, match="n_groups = 2"):
        Mamba2(hidden_size=64, head_dim=16, n_groups=2).tensor_parallel_plan(4)
    with pytest.raises(ConfigError, match="model.vocab_size = 67"):
        Embedding(67, 8).tensor_parallel_plan(2)


def test_a_plan_cannot_change_what_a_config_has_not():
    config = Attention(hidden_size=32, num_heads=4).config
    share = config_of_share(config, {"num_heads": 2, "kv_heads": 2})
    assert (share.num_heads, share.kv_heads, share.head_dim) == (2, 2, 8)
    with pytest.raises(FlameError, match="has no head_count"):
        config_of_share(config, {"head_count": 2})
