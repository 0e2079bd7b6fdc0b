"""Modules that one operation may compute together."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flame.models.modules import Linear, fuses


def test_only_plain_layers_on_a_gpu_are_fused_and_autocast_is_left_to_the_layers():
    with FakeTensorMode():
        x, layer = torch.empty(2, 3, 8, device="cuda"), Linear(8, 8)
        assert fuses(x, layer, Linear(8, 4))
        assert not fuses(x, layer, Linear(8, 4, bias=True))
        assert not fuses(x, torch.nn.Linear(8, 8, bias=False))
        assert not fuses(torch.empty(2, 3, 8), layer)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert not fuses(x, layer)
        finally:
            torch.set_autocast_enabled("cuda", False)
