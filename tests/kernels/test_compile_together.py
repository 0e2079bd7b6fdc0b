"""The first call of a kind is gone through once on meta tensors; nothing that goes wrong there reaches the caller."""

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime.jit import JITFunction

from flame.kernels import compile_together
from flame.kernels.compile_together import compiled_together


@pytest.fixture(autouse=True)
def _compiling(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(compile_together, "_done", set())


def test_first_call_of_a_kind_is_rehearsed_without_data():
    seen = []

    @compiled_together(lambda inputs, outputs: seen.append(("then", outputs.device.type)))
    def double(x, flag):
        seen.append((x.device.type, flag))
        return 2 * x

    for x in (torch.ones(1, 5, 4), torch.ones(2, 7, 4)):
        assert double(x, True).sum() == 2 * x.numel()
    assert seen == [("meta", True), ("then", "meta"), ("cpu", True), ("cpu", True)]
    double(torch.ones(1, 5, 8), True)
    double(torch.ones(1, 5, 8), False)
    assert [each[0] for each in seen[4:]] == ["meta", "then", "cpu"] * 2


def test_rehearsal_keeps_strides():
    strides = []
    function = compiled_together()(lambda x: strides.append(x.stride()))
    function(torch.ones(2, 3, 8)[..., ::2].transpose(0, 1))
    assert strides[0] == strides[1] == (8, 24, 2)


def test_error_of_a_rehearsal_is_not_the_callers():
    launch, hook = JITFunction.run, knobs.runtime.jit_cache_hook

    @compiled_together(lambda inputs, outputs: 1 / 0)
    def function(x):
        return int(x.sum())  # a meta tensor has no number

    assert function(torch.ones(3)) == 3
    assert JITFunction.run is launch and knobs.runtime.jit_cache_hook is hook


def test_op_within_an_op_belongs_to_its_rehearsal():
    calls = []

    @compiled_together()
    def inner(x):
        calls.append(("inner", x.device.type))
        return x

    @compiled_together(lambda inputs, outputs: inner(outputs))
    def outer(x):
        return inner(x)

    outer(torch.ones(3))
    assert calls == [("inner", "meta"), ("inner", "meta"), ("inner", "meta"), ("inner", "cpu")]
