"""Stages hold consecutive layers, of about the same cost, on the ranks that their schedule wants them on."""

import itertools

import pytest
import torch

from flame.models.decoder import build_model
from flame.parallel.pipeline_split import balanced_cuts, layer_costs, schedule_kind, split_stages, stage_rank
from flame.parallel.pipeline_stage import Boundary, StageModel, find_boundaries

CONFIG = {"model_type": "transformer", "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 8, "vocab_size": 64}


def meta(**values):
    with torch.device("meta"):
        return build_model({**CONFIG, **values})


def most(costs, cuts, head):
    bounds = [0, *cuts, len(costs)]
    runs = [sum(costs[first:last]) for first, last in itertools.pairwise(bounds)]
    return max([*runs[:-1], runs[-1] + head])


@pytest.mark.parametrize("head", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_other_cut_has_a_faster_slowest_stage(count, head):
    costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    cuts = balanced_cuts(costs, count, head)
    best = min(most(costs, other, head) for other in itertools.combinations(range(1, len(costs)), count - 1))
    assert most(costs, cuts, head) == best
    assert len(cuts) == count - 1


def test_the_head_counts_as_layers():
    plain, wide = meta(), meta(vocab_size=64 * 400)
    assert [stage.last - stage.first for stage in split_stages(plain, 128, 4, 1, False)] == [2, 2, 2, 2]
    last = split_stages(wide, 128, 4, 1, False)[-1]
    assert last.last - last.first == 1


def test_costs_of_a_model_are_those_of_its_flops():
    model = meta()
    head = 2 * model.lm_head.weight.numel()
    assert 3 * (sum(layer_costs(model, 128)) + head) == pytest.approx(model.flops_per_token(128))


def test_stages_go_around_or_back_and_forth():
    assert [stage_rank(index, 2, False) for index in range(4)] == [0, 1, 0, 1]
    assert [stage_rank(index, 3, True) for index in range(6)] == [0, 1, 2, 2, 1, 0]


def test_schedules_are_known_in_any_case():
    assert schedule_kind("zbvzerobubble")[0] == "ZBVZeroBubble"


def test_stages_together_have_every_parameter_once():
    whole = meta(attnres_block_size=2)
    stages = split_stages(whole, 128, 3, 1, False)
    with torch.device("meta"):
        parts = [StageModel(whole.config, stage, Boundary(), Boundary()) for stage in stages]
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    assert whole.no_weight_decay() == set().union(*(part.no_weight_decay() for part in parts))


def test_boundaries_grow_with_rows_and_tokens_as_the_tensors_do():
    early, late = find_boundaries(meta(attnres_block_size=2).to(torch.bfloat16), [1, 4])
    assert late.carried == ["sources"]
    assert [tuple(tensor.shape) for tensor in early.room(3, 40, "meta")] == [(3, 40, 32), (1, 3, 40, 32)]
    assert [tuple(tensor.shape) for tensor in late.room(3, 40, "meta")] == [(3, 40, 32), (4, 3, 40, 32)]
    assert late.room(1, 1, "meta")[0].dtype == torch.bfloat16
    assert late.bytes(3, 40) == 2 * 5 * 3 * 40 * 32
