"""The kernels of log-linear attention, run by Triton's interpreter, equal the fp64 form: outputs and every gradient."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels.log_linear_attention import log_linear_attention, triton_layout, triton_op, triton_passes

CHUNK, RUN = 16, 2  # so that short sequences have deep trees


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(triton_layout, "CHUNK", CHUNK)
    monkeypatch.setattr(triton_passes, "RUN", RUN)


def inputs(tokens, batch=1, heads=(1, 1, 1), K=16, V=16, levels=10, strength=0.3):
    rng = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(batch, tokens, *shape, generator=rng, dtype=torch.float64)  # noqa: E731
    Hq, Hk, H = heads
    return {
        "q": draw(Hq, K),
        "k": draw(Hk, K),
        "v": draw(H, V),
        "level_weights": draw(H, levels),
        "scalar_decay": -strength * draw(H).abs(),
    }


def run(call, backend, bounds, rounding):
    """Output and gradients by name; the cotangent is the same rounded numbers for every dtype of the inputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in call.items()}
    o, _ = log_linear_attention(**leaves, cu_seqlens=bounds, backend=backend)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(rounding).to(o.dtype)
    return {"o": o.detach(), **dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), cotangent)))}


def check(call, tolerance=1e-5, dtype=torch.float32, bounds=None):
    keep = ("level_weights", "scalar_decay")
    call = {name: x.to(torch.float32 if name in keep else dtype) for name, x in call.items()}
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    got = run(call, "triton", bounds, dtype)
    for name, want in run({name: x.double() for name, x in call.items()}, "chunked", bounds, dtype).items():
        error = (got[name].double() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 150])
def test_kernels_equal_the_fp64_form_at_any_length(tokens):
    check(inputs(tokens, batch=2 if tokens < 100 else 1))


def test_nodes_larger_than_a_run_are_merged_and_partly_filled_siblings_are_read():
    assert triton_layout.ceil_div(250, CHUNK) > 4 * RUN
    check(inputs(250))


def test_packed_documents_never_meet():
    check(inputs(130), bounds=[0, 1, 1, 17, 40, 130])


@pytest.mark.parametrize("levels", [2, 4, 6])
def test_few_levels_share_the_last_one(levels):
    check(inputs(70, levels=levels))


@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 1, 2), (1, 2, 4)])
def test_grouped_queries_and_keys_are_shared(heads):
    check(inputs(40, heads=heads))


def test_sizes_of_heads_need_not_be_powers_of_two():
    check(inputs(40, K=24, V=40))


def test_decays_of_any_strength_neither_overflow_nor_lose_digits():
    check(inputs(70, strength=0.0))
    # Decays are summed over a chunk, to some 700 in base 2, where fp32 resolves 6e-5 of an exponent.
    check(inputs(70, strength=30.0), tolerance=3e-5)


def test_bf16_stays_within_rounding():
    check(inputs(150, levels=9), tolerance=5e-3, dtype=torch.bfloat16)


def test_rounding_does_not_pile_up_in_the_decays_gradient():
    """Over forty chunks and weak decays, where a plain suffix sum would carry every later token's error to the first."""
    check(inputs(40 * CHUNK, strength=0.003, levels=11), tolerance=5e-3, dtype=torch.bfloat16)


def test_operators_pass_through_fake_tensors_and_autograd():
    call = {name: x.float().requires_grad_() for name, x in inputs(40).items()}
    tensors = (*call.values(), None)
    torch.library.opcheck(
        torch.ops.flame.log_linear_attention_forward,
        (*(x.detach() for x in tensors[:-1]), None, 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
    do = torch.randn_like(call["v"])
    torch.library.opcheck(
        torch.ops.flame.log_linear_attention_backward,
        (*(x.detach() for x in tensors[:-1]), None, do.detach(), 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch._dynamo.reset()

    def step(**leaves):
        return triton_op._Chunks.apply(*leaves.values(), None, 0.25)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted, got = (torch.autograd.grad(f(**call).square().sum(), list(call.values())) for f in (step, compiled))
    torch.testing.assert_close(got, wanted)
