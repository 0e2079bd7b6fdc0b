import pytest
import torch
from torch import nn

from flame.errors import FlameError
from flame.models import build_model, initialize_weights
from flame.models.initialize import initialize_unit

CONFIG = {"model_type": "gla", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}


def meta_started(config: dict, seed: int):
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    initialize_weights(model, seed)
    return model


def test_a_meta_start_writes_every_parameter_and_repeats():
    first, second, other = meta_started(CONFIG, 7), meta_started(CONFIG, 7), meta_started(CONFIG, 8)
    for name, parameter in first.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_layer_keeps_its_weights_when_others_are_added():
    short, long = meta_started(CONFIG, 7), meta_started({**CONFIG, "num_hidden_layers": 3}, 7)
    assert torch.equal(short.model.layers[1].attn.q_proj.weight, long.model.layers[1].attn.q_proj.weight)
    assert not torch.equal(long.model.layers[1].attn.q_proj.weight, long.model.layers[2].attn.q_proj.weight)


def test_tied_weights_are_one_parameter_after_a_meta_start():
    model = meta_started({**CONFIG, "tie_word_embeddings": True}, 7)
    assert model.lm_head.weight is model.model.embeddings.weight


def test_an_unwritten_parameter_is_named():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.gate = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3))

        def reset_parameters(self):
            nn.init.ones_(self.weight)

    with pytest.raises(FlameError, match="gate"), torch.no_grad():
        initialize_unit("layer", Forgetful(), torch.device("cpu"))
