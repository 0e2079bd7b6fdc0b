"""Every system's block is captured as one graph, so that compilation pays and CUDA graphs and FSDP see one region."""

import pytest
import torch

from flame.models.decoder import build_model
from flame.models.registry import systems
from tests.models.test_hf import NEEDS, SMALL

# Their torch form reads the document boundaries on the host; on a GPU a kernel takes its place.
READ_ON_HOST = {"forgetting_transformer", "mla", "moba", "nsa", "rodimus", "samba", "transformer"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_compiled(model_type, cu_seqlens):
    model = build_model({**SMALL, "model_type": model_type, **NEEDS.get(model_type, {"num_heads": 2})})
    ids = torch.arange(48)[None] % 50
    expected = model(ids, labels=ids, cu_seqlens=cu_seqlens).loss_sum
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    loss = model(ids, labels=ids, cu_seqlens=cu_seqlens).loss_sum
    loss.backward()
    torch.testing.assert_close(loss, expected)


ALWAYS = ("gla", "transformer")  # the others take minutes together


def quick_or_slow(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@pytest.mark.parametrize("model_type", quick_or_slow(systems()))
def test_blocks_of_plain_rows_are_one_graph(model_type):
    run_compiled(model_type, None)


@pytest.mark.parametrize("model_type", quick_or_slow(set(systems()) - READ_ON_HOST))
def test_blocks_of_packed_rows_are_one_graph(model_type):
    run_compiled(model_type, torch.tensor([0, 20, 48], dtype=torch.int32))
