import torch
import torch.nn as nn

from flame.optim.groups import parameter_groups, split_matrices
from flame.optim.muon import Muon, MuonOptions, newton_schulz

YES, NO, LR = torch.tensor(True), torch.tensor(False), torch.tensor(0.02)


def test_newton_schulz_makes_singular_values_nearly_one():
    torch.manual_seed(0)
    for shape in [(24, 24), (16, 40), (40, 16)]:
        matrix = torch.randn(shape)
        result = newton_schulz(matrix, 5).float()
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.3 and values.max() < 1.3
        # The singular vectors are those of the matrix.
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((u @ v).flatten(), result.flatten(), dim=0) > 0.95


def make():
    torch.manual_seed(0)
    net = nn.Linear(12, 20, bias=False)
    return net, Muon(parameter_groups(net, 0.1), MuonOptions())


def test_update_is_the_scaled_orthogonal_momentum_and_decay():
    net, muon = make()
    before, gradient = net.weight.detach().clone(), torch.randn(20, 12)
    net.weight.grad = gradient.clone()
    muon.step(LR, YES)
    nesterov = gradient * 0.05 + 0.95 * 0.05 * gradient  # both terms point along the first gradient
    direction = newton_schulz(nesterov, 5).float() * 0.2 * 20**0.5
    torch.testing.assert_close(net.weight.detach(), before * (1 - 0.02 * 0.1) - 0.02 * direction, rtol=1e-2, atol=1e-4)


def test_a_skipped_step_changes_nothing():
    net, muon = make()
    net.weight.grad = torch.randn(20, 12)
    muon.step(LR, YES)
    weight, momentum = net.weight.detach().clone(), muon.momentum["weight"].clone()
    net.weight.grad = torch.full((20, 12), float("nan"))
    muon.step(LR, NO)
    assert torch.equal(net.weight, weight) and torch.equal(muon.momentum["weight"], momentum)


def test_matrices_of_blocks_are_split_from_the_rest():
    net = nn.ModuleDict({"embeddings": nn.Embedding(5, 4), "layers": nn.ModuleList([nn.Linear(4, 4)])})
    matrices, rest = split_matrices(parameter_groups(net, 0.1), ["layers."])
    assert [list(group.parameters) for group in matrices] == [["layers.0.weight"]]
    assert sorted(name for group in rest for name in group.parameters) == ["embeddings.weight", "layers.0.bias"]
