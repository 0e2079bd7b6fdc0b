"""Direct: the same result with and without dispatch, and observers still see the op."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flame.kernels import direct
from flame.kernels.normalization import rms_norm, triton_ops  # noqa: F401 - registers the op
from flame.kernels.normalization.triton_norm import forward as kernel


def grads(call, x, w):
    return torch.autograd.grad(call(x, w), (x, w))


def norm_sum(x, w):
    return rms_norm(x, w, backend="triton").square().sum()


def inputs():
    torch.manual_seed(0)
    return torch.randn(5, 12, requires_grad=True), torch.randn(12, requires_grad=True)


def test_direct_and_registered_agree(monkeypatch):
    x, w = inputs()
    plain = grads(norm_sum, x, w)
    monkeypatch.setattr(direct, "unobserved", lambda x: False)
    for a, b in zip(grads(norm_sum, x, w), plain):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("saved", [False, True])
def test_selective_checkpointing_can_save_the_op(saved, monkeypatch):
    x, w = inputs()
    calls = []
    monkeypatch.setattr("flame.kernels.normalization.triton_norm.forward", lambda *a: calls.append(1) or kernel(*a))

    def policy(ctx, op, *args, **kwargs):
        keep = saved and op == torch.ops.flame.norm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(x, w):
        def contexts():
            return create_selective_checkpoint_contexts(policy)

        return checkpoint(norm_sum, x, w, use_reentrant=False, context_fn=contexts)

    got = grads(checkpointed, x, w)
    assert len(calls) == (1 if saved else 2)
    for a, b in zip(got, grads(norm_sum, x, w)):
        torch.testing.assert_close(a, b)


def test_compilers_modes_and_subclasses_observe():
    x, _ = inputs()
    assert direct.unobserved(x)
    assert direct.unobserved(torch.nn.Parameter(x.detach()))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert not direct.unobserved(x)
    assert not direct.unobserved(mode.from_tensor(x.detach()))
