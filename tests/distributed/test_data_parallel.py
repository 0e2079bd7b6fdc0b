"""The loss curve does not depend on ranks, accumulation, or how parameters are laid out."""

import pytest
import torch
from ranks import run_ranks
from tiny import CONFIG, full_parameters, make_step, merge, micro_batches, sharded_model

from flame.parallel.mesh import Degrees
from flame.step import StepOptions

pytestmark = pytest.mark.distributed
ROWS = 8  # sequences in a global step
STEPS = 3


def train(rank, degrees, world_size, accumulation, **options):
    step, mesh = make_step(degrees, world_size, **options)
    history, gradients = [], {}
    update = step.optimizer.step

    def capture(apply):
        if not gradients:
            gradients.update({name: p.grad.full_tensor().clone() for name, p in step.model.named_parameters()})
        return update(apply)

    step.optimizer.step = capture
    for index in range(STEPS):
        batches = merge(micro_batches(index, mesh.data_rank, world_size, ROWS), accumulation)
        result = step(batches, index + 1)
        history.append([result.loss.item(), result.grad_norm.item(), result.tokens.item()])
    return torch.tensor(history, dtype=torch.float64), gradients, full_parameters(step.model)


@pytest.fixture(scope="module")
def reference():
    return run_ranks(train, 1, Degrees(), 1, 1)[0]


LAYOUTS = {
    "one_rank_accumulating": (Degrees(), 1, 4),
    "fsdp_2": (Degrees(dp_shard=2), 2, 1),
    "fsdp_2_accumulating": (Degrees(dp_shard=2), 2, 4),
    "replicated_2": (Degrees(dp_replicate=2), 2, 1),
    "fsdp_4": (Degrees(dp_shard=4), 4, 1),
    "hsdp_2x2": (Degrees(dp_replicate=2, dp_shard=2), 4, 1),
    "hsdp_2x2_accumulating": (Degrees(dp_replicate=2, dp_shard=2), 4, 2),
}


def assert_same_run(result, reference):
    history, gradients, parameters = result
    torch.testing.assert_close(history, reference[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[1][name], rtol=1e-4, atol=1e-6, msg=name)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, reference[2][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_one_rank(layout, reference):
    degrees, world_size, accumulation = LAYOUTS[layout]
    for result in run_ranks(train, world_size, degrees, world_size, accumulation):
        assert_same_run(result, reference)


def train_reducing_every(rank):
    return train(rank, Degrees(dp_replicate=2, dp_shard=2), 4, 2, step_options=StepOptions(reduce_every=True))


def test_reducing_every_micro_batch_changes_nothing(reference):
    assert_same_run(run_ranks(train_reducing_every, 4)[0], reference)


def train_with_policy(rank, policy, offload):
    return train(rank, Degrees(dp_shard=2), 2, 2, reshard_after_forward=policy, cpu_offload=offload)


@pytest.mark.parametrize("policy, offload", [("always", False), ("never", False), ("default", True)])
def test_resharding_and_offloading_change_nothing(policy, offload, reference):
    assert_same_run(run_ranks(train_with_policy, 2, policy, offload)[0], reference)


def initial_weights(rank, degrees, world_size):
    return full_parameters(sharded_model(degrees, world_size)[0])


def test_initial_weights_are_bitwise_the_same_for_every_layout():
    expected = run_ranks(initial_weights, 1, Degrees(), 1)[0]
    for degrees, world_size in [(Degrees(dp_shard=2), 2), (Degrees(dp_replicate=2, dp_shard=2), 4)]:
        for weights in run_ranks(initial_weights, world_size, degrees, world_size):
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)


def tied_weights(rank):
    step, mesh = make_step(Degrees(dp_shard=2), 2, config={**CONFIG, "tie_word_embeddings": True})
    step(micro_batches(0, mesh.data_rank, 2, ROWS), 1)
    model = step.model
    return model.lm_head.weight is model.decoder.embeddings.weight, len(full_parameters(model))


def test_tied_weights_stay_tied():
    assert all(tied for tied, _ in run_ranks(tied_weights, 2))
