"""A NaN on one rank is treated alike on all of them, without the host looking."""

import traceback
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from tiny import full_parameters, make_step, micro_batches
from torch.utils._python_dispatch import TorchDispatchMode

from flame.errors import ConfigError
from flame.parallel.mesh import Degrees
from flame.step import FiniteGuard, NonFiniteStep

pytestmark = pytest.mark.distributed
BAD = 2


def poison_gradient(step):
    """The next backward gives a NaN in one gradient of this rank."""
    parameter = step.model.blocks[0].mlp.down_proj.weight
    handle = parameter.register_post_accumulate_grad_hook(
        lambda p: (p.grad.to_local().fill_(float("nan")), handle.remove())
    )


def train(rank, policy, world_size, steps):
    step, mesh = make_step(Degrees(dp_shard=world_size), world_size, policy)
    history = []
    for index in range(1, steps + 1):
        if index == BAD and rank == world_size - 1:
            poison_gradient(step)
        result = step(micro_batches(index, mesh.data_rank, world_size, 4), index)
        history.append((full_parameters(step.model), result.learning_rate.item(), result.grad_norm.item()))
    problem = None
    try:
        step.guard.check()
    except NonFiniteStep as error:
        problem = error.step, str(error)
    return history, step.guard.skipped.item(), problem


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("world_size", [1, 2])
def test_skip_leaves_weights_and_schedule_untouched_and_goes_on(world_size):
    for history, skipped, problem in run_ranks(train, world_size, "skip", world_size, 3):
        weights, rates, norms = zip(*history)
        assert torch.isnan(torch.tensor(norms[BAD - 1]))
        assert equal(weights[0], weights[1]) and not equal(weights[1], weights[2])
        assert rates[1] == rates[2] and rates[0] < rates[1]  # the schedule waits for the next applied update
        assert skipped == 1 and problem is None


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_stop_keeps_the_last_good_weights_until_the_host_looks(policy):
    for history, _, problem in run_ranks(train, 2, policy, 2, 4):
        weights = [entry[0] for entry in history]
        assert equal(weights[0], weights[1]) and equal(weights[0], weights[3])
        step, text = problem
        assert step == BAD and f"step {BAD}" in text and "training.nan_policy" in text


def test_too_many_skips_in_a_row_are_an_error():
    guard = FiniteGuard("skip", torch.device("cpu"), max_consecutive=3)
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    for step, norm in enumerate([nan, nan, one, nan, nan]):
        guard.allow(one, norm, step)
        guard.check()
    guard.allow(nan, one, 5)
    with pytest.raises(NonFiniteStep, match="3 consecutive steps"):
        guard.check()


def test_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        FiniteGuard("skipp", torch.device("cpu"))


class HostReads(TorchDispatchMode):
    """Operations that hand a value to the host, on a GPU each a wait; `item`, `tolist`, `bool` and indexing end here."""

    READING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in self.READING:
            self.found.append("".join(traceback.format_stack()[-4:-1]))
        return func(*args, **(kwargs or {}))


def count_reads(rank):
    step, mesh = make_step(Degrees(dp_shard=2), 2)
    # Plain rows: the torch form of attention, which CPUs use, loops over packed documents on the host.
    batches = [replace(batch, cu_seqlens=None) for batch in micro_batches(0, mesh.data_rank, 2, 4)]
    step(batches, 1)  # the first call builds caches
    with HostReads() as reads:
        step(batches, 2)
        result = step(batches, 3)
        seen = len(reads.found)
        result.loss.item()  # what the test would miss if it could not see any
    return reads.found[:seen], len(reads.found) - seen


def test_a_step_reads_nothing_back_from_the_device():
    assert run_ranks(count_reads, 2) == [([], 1), ([], 1)]
