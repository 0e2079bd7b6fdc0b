import pytest
import torch
import torch.nn as nn

from flame.errors import FlameError
from flame.optim.clipping import clip_gradients, global_grad_norm
from flame.optim.groups import describe_groups, parameter_groups, summarize_names


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.table_bias = nn.Parameter(torch.zeros(2, 3))
        self.A_log = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Parameter(torch.zeros(2, 3), requires_grad=False)

    def no_weight_decay(self):
        return {"A_log"}


def test_vectors_biases_and_declared_parameters_take_no_decay():
    decay, no_decay = parameter_groups(Net(), 0.1)
    assert set(decay.parameters) == {"embeddings.weight", "proj.weight"} and decay.weight_decay == 0.1
    assert set(no_decay.parameters) == {"proj.bias", "norm.weight", "table_bias", "A_log"}
    assert no_decay.weight_decay == 0.0


def test_tied_parameters_are_counted_once():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    (group,) = parameter_groups(net, 0.1)
    assert len(group.parameters) == 1


def test_description_lists_every_group():
    text = describe_groups(parameter_groups(Net(), 0.1), lr=3e-4)
    lines = text.splitlines()
    assert len(lines) == 3 and "0.1" in lines[1] and "0.0003" in lines[1] and "A_log" in lines[2]


def test_names_are_summarized_by_kind():
    names = [f"model.layers.{i}.attn.{kind}" for i in range(3) for kind in ("q_proj.weight", "A_log")]
    assert summarize_names(names) == "q_proj.weight, A_log"
    assert summarize_names([f"p{i}" for i in range(10)], limit=2) == "p0, p1, and 8 more"


def test_norm_and_clipping_equal_torch():
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 3
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = global_grad_norm(gradients)
    clip_gradients(gradients, norm, 1.0)
    expected = nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.testing.assert_close(norm, expected)
    for mine, parameter in zip(gradients, parameters):
        torch.testing.assert_close(mine, parameter.grad)


def test_small_gradients_are_not_scaled_up():
    gradients = [torch.full((4,), 0.1)]
    clip_gradients(gradients, global_grad_norm(gradients), 1.0)
    assert torch.equal(gradients[0], torch.full((4,), 0.1))


def test_non_finite_gradients_give_a_non_finite_norm():
    for value in (float("nan"), float("inf")):
        assert not torch.isfinite(global_grad_norm([torch.ones(3), torch.tensor([1.0, value])]))


def test_no_gradient_at_all_is_an_error():
    with pytest.raises(FlameError, match="no parameter has a gradient"):
        global_grad_norm([])
