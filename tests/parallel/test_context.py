"""Where rows cannot be cut over context-parallel ranks, the job is refused before anything is allocated."""

import pytest
import torch

from flame.config.sections import JobConfig
from flame.data.batch import Batch
from flame.errors import ConfigError, FlameError
from flame.kernels.sequence import SequenceShard
from flame.kernels.token_shift import token_shift
from flame.models.decoder import build_model
from flame.models.mixers.base import Mixer
from flame.models.mixers.gla import GatedLinearAttention
from flame.parallel.context import check_context_parallel
from flame.schema import build

SHAPE = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 67}


def check(ranks, model=None, **sections):
    job = build(JobConfig, {"training": {"seq_len": 64}, **sections}, where="job")
    with torch.device("meta"):
        check_context_parallel(build_model({"model_type": "gla", **SHAPE, **(model or {})}), job, ranks)


def test_a_fitting_job_passes():
    check(4, {"use_short_conv": True})


def test_ranks_must_divide_the_row():
    with pytest.raises(ConfigError, match="context_parallel_degree = 3 does not divide training.seq_len = 64"):
        check(3)


def test_a_rank_must_hold_what_a_convolution_looks_back():
    with pytest.raises(ConfigError, match="leaves 2 tokens .* fewer than the convolution"):
        check(32, {"use_short_conv": True})


def test_graphs_are_refused():
    with pytest.raises(ConfigError, match="cuda_graph"):
        check(2, compile={"cuda_graph": True})


def test_a_mixer_that_needs_whole_sequences_is_named(monkeypatch):
    monkeypatch.setattr(GatedLinearAttention, "context_parallel", False)
    with pytest.raises(ConfigError, match="GatedLinearAttention .* needs whole sequences"):
        check(2)


def test_a_mixer_that_says_nothing_is_refused():
    """One that forgets ctx.shard would train on wrong states without an error."""

    class Forgetful(Mixer):
        pass

    assert not Forgetful.context_parallel


def test_states_and_shards_exclude_each_other():
    shard = SequenceShard(None, 0, 2, torch.tensor(0))
    with pytest.raises(FlameError, match="states come from and go to the other ranks"):
        token_shift(torch.zeros(1, 4, 3), state=torch.zeros(1, 3), shard=shard)


def test_a_batch_moves_with_its_shard():
    shard = SequenceShard(None, 0, 2, torch.tensor(3))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert Batch(ids, ids, shard=shard).to("meta").shard.before.is_meta
