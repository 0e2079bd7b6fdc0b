"""Activation checkpointing and compilation change memory and speed, never the result."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flame.errors import ConfigError
from flame.models.decoder import build_model
from flame.parallel.activation_checkpoint import apply_activation_checkpointing
from flame.parallel.compile import compile_blocks

CONFIG = {
    "model_type": "transformer",
    "hidden_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
}


class CountMatmuls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def gradients(prepare, cu_seqlens=None):
    torch.manual_seed(0)
    model = build_model(CONFIG)
    names = list(dict(model.named_parameters()))
    prepare(list(model.blocks))
    tokens = torch.randint(0, 61, (1, 17))
    with CountMatmuls() as counter:
        model(tokens[:, :-1], labels=tokens[:, 1:], cu_seqlens=cu_seqlens).loss_sum.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert list(grads) == names  # neither may rename parameters
    return grads, counter.count


def checkpointing(mode, option="op"):
    return lambda blocks: apply_activation_checkpointing(blocks, mode, option)


@pytest.mark.parametrize("mode, option", [("full", "op"), ("selective", "op"), ("selective", "2")])
def test_recomputation_gives_the_same_gradients(mode, option):
    expected, _ = gradients(checkpointing("none"))
    found, _ = gradients(checkpointing(mode, option))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_modes_recompute_as_much_as_they_say():
    plain = gradients(checkpointing("none"))[1]
    full = gradients(checkpointing("full"))[1]
    assert gradients(checkpointing("selective", "op"))[1] == plain  # every matrix product is kept
    assert gradients(checkpointing("selective", "2"))[1] == plain + (full - plain) // 2
    assert full > plain


@pytest.mark.parametrize("mode, option, text", [("ful", "op", "none, full, selective"), ("selective", "0", "positive")])
def test_unknown_modes_are_refused(mode, option, text):
    with pytest.raises(ConfigError, match=text):
        gradients(checkpointing(mode, option))


@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_compiled_blocks_give_the_same_gradients(checkpoint):
    def prepare(blocks):
        apply_activation_checkpointing(blocks, checkpoint, "op")
        compile_blocks(blocks, backend="aot_eager")

    cu_seqlens = torch.tensor([0, 5, 16], dtype=torch.int32)
    expected, _ = gradients(lambda blocks: None, cu_seqlens)
    found, _ = gradients(prepare, cu_seqlens)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
