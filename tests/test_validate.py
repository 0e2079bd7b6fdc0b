import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flame.data import Batch, Tokenizer
from flame.models.decoder import CausalLMOutput
from flame.validate import Validator, token_bytes

TEXTS = ["def f(x):\n    return x", "naïve café, größer", "日本語 text", ""]


@pytest.mark.parametrize("tokenizer", [Tokenizer.byte_level(), Tokenizer.train(TEXTS * 5, 300)], ids=["bytes", "bpe"])
def test_bytes_of_tokens_add_up_to_the_text(tokenizer):
    sizes = token_bytes(tokenizer)
    for text in TEXTS:
        assert sizes[torch.tensor(tokenizer.encode(text), dtype=torch.int64)].sum() == len(text.encode())
    assert sizes[tokenizer.eos_id] == sizes[tokenizer.bos_id] == 0


class Constant(nn.Module):
    """Two nats for every target."""

    def forward(self, input_ids, *, labels, **layout):
        assert not self.training
        return CausalLMOutput(loss_sum=2.0 * (labels != -100).sum().float())


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_loss_is_per_token_and_per_byte_of_targets_only(group):
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    batches = [
        Batch(torch.zeros_like(labels), labels),
        Batch(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[2]])),
    ]
    sizes = torch.tensor([0, 1, 3, 5])
    model = Constant()
    result = Validator(model, batches, sizes, torch.device("cpu"), group)()
    assert (result.loss, result.tokens) == (2.0, 4)
    assert result.bits_per_byte == pytest.approx(4 * 2.0 / math.log(2) / (1 + 3 + 5 + 3))
    assert model.training
