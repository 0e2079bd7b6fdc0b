"""A model's compile time does not grow with its depth: layers of a kind share one compilation."""

import pytest
import torch
from torch._dynamo.utils import counters

from flame.models.context import make_context
from flame.models.decoder import build_model
from flame.models.registry import systems
from tests.models.test_hf import NEEDS, SMALL

QUICK = ("gla", "hgrn", "rwkv7")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(systems())]
)
def test_four_layers_are_compiled_at_most_twice(model_type):
    values = {**SMALL, "model_type": model_type, **NEEDS.get(model_type, {"num_heads": 2}), "num_hidden_layers": 4}
    model = build_model(values)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    ids = torch.arange(48)[None] % 50
    model(ids, labels=ids).loss_sum.backward()
    assert counters["stats"]["unique_graphs"] <= 2  # a first layer, or every second one, may be of its own kind


def test_any_number_of_documents_shares_a_compilation():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    longest = torch.compile(lambda ctx: ctx.cu_seqlens.diff().max(), backend=backend)
    for bounds in ([0, 20, 48], [0, 5, 20, 48], [0, 5, 11, 13, 20, 48]):
        ctx = make_context(48, torch.device("cpu"), torch.tensor(bounds, dtype=torch.int32))
        assert longest(ctx) == 28
    assert len(compiled) == 1
