"""A compiled block under full activation checkpointing keeps its input for the backward and nothing that an op made."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flame.models.context import make_context
from flame.models.decoder import build_model
from flame.models.registry import systems
from tests.compile.test_blocks_are_one_graph import quick_or_slow
from tests.models.test_hf import NEEDS, SMALL

T = 128


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("FLAME_BACKEND", "triton")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bytes_kept(call, x, parameters):
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = call(x)  # while it lives, so does all that it keeps: no address is used twice
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("model_type", quick_or_slow(systems()))
def test_a_checkpointed_block_keeps_its_input(model_type):
    model = build_model({**SMALL, "model_type": model_type, **NEEDS.get(model_type, {"num_heads": 2})})
    block = next(iter(model.blocks))
    x = torch.randn(1, T, SMALL["hidden_size"], requires_grad=True)
    context, carried = make_context(T, x.device), model.decoder.initial_carried()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def run(x):
        return block(x, context.at_layer(None, carried))[0]

    compiled = torch.compile(
        lambda x: checkpoint(run, x, use_reentrant=False), fullgraph=True, backend="aot_eager_decomp_partition"
    )
    assert bytes_kept(run, x, parameters) > 4 * x.nbytes
    assert bytes_kept(compiled, x, parameters) <= 1.2 * x.nbytes  # and positions
