"""Each op on a sequence cut over ranks equals the op on the whole sequence, forward and backward."""

import pytest
import torch
from ranks import run_ranks

from flame.kernels.linear_attention import linear_attention
from flame.kernels.sequence import cut_sequence
from flame.kernels.short_convolution import short_convolution
from flame.kernels.softmax_attention import softmax_attention
from flame.kernels.token_shift import token_shift

pytestmark = pytest.mark.distributed
T, H, K, V = 48, 2, 6, 5
DOCUMENTS = {  # bounds of packed documents; None for plain rows
    "plain": None,
    "long": (0, 48),  # one document over all ranks
    "crossing": (0, 5, 29, 31, 48),
    "aligned": (0, 12, 24, 40, 48),
    "short": (0, 3, 9, 14, 15, 20, 26, 31, 37, 44, 48),
}
SHARED = "shared_"  # inputs of this name are parameters: their gradients are sums over ranks


def decay(*shape):
    return -torch.rand(*shape) * 0.3


def linear(B, **decays):
    return {"q": torch.randn(B, T, H, K), "k": torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V), **decays}


def run_linear(x, **options):
    return linear_attention(**{name.removeprefix(SHARED): value for name, value in x.items()}, **options)[0]


def grouped(B):
    q, k, v = torch.randn(B, T, 2, K), torch.randn(B, T, 1, K), torch.randn(B, T, 4, V)
    return {"q": q, "k": k, "v": v, "key_decay": decay(B, T, 2, K)}


def run_convolution(x, **options):
    return short_convolution(x["x"], x[SHARED + "weight"], x[SHARED + "bias"], activation="silu", **options)[0]


def attention_inputs(B):
    return {"q": torch.randn(B, T, 4, K), "k": torch.randn(B, T, 2, K), "v": torch.randn(B, T, 1, V)}


def run_attention(window):
    return lambda x, **options: softmax_attention(**x, window=window, **options)


CASES = {
    "linear_none": (lambda B: linear(B), run_linear),
    "linear_head": (lambda B: linear(B, shared_head_decay=decay(H)), run_linear),
    "linear_scalar": (lambda B: linear(B, scalar_decay=decay(B, T, H)), run_linear),
    "linear_key": (lambda B: linear(B, key_decay=decay(B, T, H, K)), run_linear),
    "linear_value": (lambda B: linear(B, value_decay=decay(B, T, H, V)), run_linear),
    "linear_bonus": (lambda B: linear(B, key_decay=decay(B, T, H, K), shared_bonus=torch.randn(H, K)), run_linear),
    "linear_grouped": (grouped, run_linear),
    "convolution": (
        lambda B: {"x": torch.randn(B, T, 5), "shared_weight": torch.randn(5, 4), "shared_bias": torch.randn(5)},
        run_convolution,
    ),
    "token_shift": (lambda B: {"x": torch.randn(B, T, 5)}, lambda x, **options: token_shift(x["x"], **options)[0]),
    "attention": (attention_inputs, run_attention(None)),
    "attention_window": (attention_inputs, run_attention(7)),
    "attention_wide_window": (attention_inputs, run_attention(17)),
}


def compute(name, inputs, weights, **options):
    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    o = CASES[name][1](leaves, **options)
    (o * weights).sum().backward()
    return o.detach(), {key: x.grad for key, x in leaves.items()}


def whole(name, documents):
    torch.manual_seed(1)
    inputs = CASES[name][0](2 if documents is None else 1)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    weights = torch.randn(CASES[name][1](inputs, cu_seqlens=cu_seqlens).shape)
    return inputs, cu_seqlens, weights


def differences(rank, names, exchange):
    """Largest error of outputs and of each gradient, by case and documents, of this rank's part against the whole."""
    found = {}
    group = torch.distributed.group.WORLD
    size = torch.distributed.get_world_size()
    for name in names:
        for kind, documents in DOCUMENTS.items():
            inputs, cu_seqlens, weights = whole(name, documents)
            o, gradients = compute(name, inputs, weights, cu_seqlens=cu_seqlens)
            shard, local = cut_sequence(group, T, cu_seqlens, exchange=exchange)
            part = {key: x if key.startswith(SHARED) else x.chunk(size, 1)[rank] for key, x in inputs.items()}
            own, own_gradients = compute(name, part, weights.chunk(size, 1)[rank], cu_seqlens=local, shard=shard)
            errors = {"o": (own - o.chunk(size, 1)[rank]).abs().max()}
            for key, x in own_gradients.items():
                if key.startswith(SHARED):
                    torch.distributed.all_reduce(x)
                expected = gradients[key] if key.startswith(SHARED) else gradients[key].chunk(size, 1)[rank]
                errors[key] = (x - expected).abs().max() / expected.abs().max().clamp(min=1)
            found[name, kind] = {key: float(error) for key, error in errors.items()}
    return found


@pytest.mark.parametrize("ranks, exchange", [(2, "gather"), (4, "gather"), (4, "scan")])
def test_parts_of_a_sequence_equal_the_whole(ranks, exchange):
    for found in run_ranks(differences, ranks, list(CASES), exchange):
        wrong = {key: errors for key, errors in found.items() if max(errors.values()) > 2e-5}
        assert not wrong
