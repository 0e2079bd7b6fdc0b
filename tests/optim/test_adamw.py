import pytest
import torch
import torch.nn as nn

from flame.errors import ConfigError
from flame.optim.adamw import IMPLEMENTATIONS, AdamW, AdamWOptions
from flame.optim.groups import parameter_groups
from flame.optim.optimizer import Optimizer
from flame.optim.schedules import LearningRate, Schedule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.A_log = nn.Parameter(torch.randn(2, 3))

    def no_weight_decay(self):
        return {"A_log"}


def make(implementation, net, schedule=None):
    options = AdamWOptions(beta1=0.9, beta2=0.95, eps=1e-8, implementation=implementation)
    rule = AdamW(parameter_groups(net, 0.1), options)
    return Optimizer({"adamw": rule}, LearningRate(schedule or Schedule(10, warmup_steps=3), 1e-2, torch.device("cpu")))


def set_gradients(net, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if value is not None:
            parameter.grad.view(-1)[0] = value


def snapshot(net, optimizer):
    moments = [tensor.clone() for pair in optimizer.rules["adamw"].moments.values() for tensor in pair]
    return [parameter.detach().clone() for parameter in net.parameters()] + moments + [optimizer.rate.updates.clone()]


YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_updates_equal_torch_adamw(implementation):
    ours, theirs = Net(), Net()
    optimizer, schedule = make(implementation, ours), Schedule(10, warmup_steps=3)
    groups = [
        {"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in parameter_groups(theirs, 0.1)
    ]
    oracle = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(8):
        for net in (ours, theirs):
            set_gradients(net, step)
        for group in oracle.param_groups:
            group["lr"] = 1e-2 * schedule.factor(step)
        optimizer.step(YES)
        oracle.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing(implementation, value):
    net = Net()
    optimizer = make(implementation, net)
    for step, apply in enumerate([NO, YES, YES]):
        set_gradients(net, step)
        optimizer.step(apply)
    before, rate = snapshot(net, optimizer), optimizer.rate.current()
    set_gradients(net, 9, value)
    optimizer.step(NO)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(net, optimizer)))
    assert torch.equal(rate, optimizer.rate.current())
    assert optimizer.rate.updates == 2


def test_learning_rate_follows_the_schedule_and_stays_at_the_floor():
    net = Net()
    optimizer = make("foreach", net, Schedule(4, warmup_steps=2, min_lr_factor=0.1))
    rates = []
    for step in range(6):
        rates.append(optimizer.rate.current().item())
        set_gradients(net, step)
        optimizer.step(YES)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0055, 0.001, 0.001])


def test_state_continues_bitwise():
    net, other = Net(), Net()
    optimizer = make("fused", net)
    for step in range(3):
        set_gradients(net, step)
        optimizer.step(YES)
    resumed = make("fused", other)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    resumed.rate.load_state_dict(optimizer.rate.state_dict())
    for pair in ((net, optimizer), (other, resumed)):
        set_gradients(pair[0], 7)
        pair[1].step(YES)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(net, optimizer), snapshot(other, resumed)))


def test_parameters_without_gradient_are_left_alone():
    net = Net()
    optimizer = make("fused", net)
    set_gradients(net, 0)
    net.A_log.grad = None
    before = net.A_log.detach().clone()
    optimizer.step(YES)
    assert torch.equal(net.A_log, before)
    assert len(optimizer.gradients()) == 4


def test_unknown_implementation_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'fused'"):
        AdamWOptions(implementation="fussed")
