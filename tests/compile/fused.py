"""Compile the kernels of the fused ops for sm_90 at production shapes and print what each needs, as JSON."""

import json

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels.cross_entropy import triton_kl, triton_rows
from flame.kernels.cross_entropy.linear import padded_logits
from flame.kernels.cross_entropy.options import Terms
from flame.kernels.normalization import triton_norm
from flame.kernels.rotary import triton_rotary
from flame.kernels.short_convolution import triton_convolution
from flame.kernels.swiglu import triton_swiglu
from flame.kernels.token_shift import triton_mix, triton_shift


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def norms():
    for C, norm in ((2048, "rms"), (128, "gated"), (2048, "layer"), (8192, "layer"), (96, "l2")):
        gating, norm = ("silu", "rms") if norm == "gated" else ("none", norm)
        kind = triton_norm.Kind(norm, gating, 1e-6, 1)
        x, beside = meta(32768, C), meta(32768, C)
        weight = None if norm == "l2" else meta(C)
        gate, residual = (beside, None) if gating == "silu" else (None, beside)
        triton_norm.forward(x, weight, weight if norm == "layer" else None, residual, gate, kind)
        triton_norm.backward(x, residual, x, weight, None, gate, kind)


def convolutions():
    bounds = meta(9, dtype=torch.int32)
    for cu_seqlens, state in ((None, None), (bounds, None), (bounds, meta(8, 2048, 4))):
        x, weight, bias = meta(1, 4096, 2048), meta(2048, 4), None if state is None else meta(2048)
        triton_convolution.forward(x, weight, bias, state, cu_seqlens, True)
        triton_convolution.backward(x, x, weight, bias, state, cu_seqlens, True)


def losses():
    labels = meta(64, dtype=torch.int64)
    for V in (32000, 50257):
        for terms in (Terms(), Terms(1e-3, 0.1, 30.0, 1e-4)):
            triton_rows.cross_entropy_rows(padded_logits(64, V, meta(1)), labels, terms, True)
            of = triton_rows.statistics(padded_logits(64, V, meta(1)), labels, terms, 5)
            triton_rows.gradient(padded_logits(64, V, meta(1)), labels, of, terms, 2 * V, 5)
    triton_rows.gradient_from(meta(64, 32000), labels, of, terms, meta(64, 32000), meta((), dtype=torch.float32))
    triton_rows.scaled(meta(64, 128), meta((), dtype=torch.float32), torch.bfloat16)
    triton_kl.kl_rows(meta(64, 32000), meta(64, 32000), meta(64, dtype=torch.bool), 2.0, True)


def pointwise():
    wide, bounds = meta(8, 4096, 5632), meta(9, dtype=torch.int32)
    triton_swiglu.forward(wide, wide)
    triton_swiglu._gradients(wide, wide, wide)
    triton_rotary._forward(meta(8, 4096, 16, 128), meta(4096, dtype=torch.int64), 1e4, False)
    triton_shift._forward(meta(8, 4096, 2048), None, None)
    triton_shift._forward(meta(1, 4096, 2048), meta(8, 2048), bounds)
    triton_shift._gradient(meta(1, 4096, 2048), bounds)
    for mixes, cu_seqlens in ((1, None), (6, None), (6, bounds)):
        x, weight = meta(1, 32768, 1024), meta(mixes, 1024)
        triton_mix.forward(x, weight, None, cu_seqlens)
        triton_mix.backward([x] * mixes, x, weight, None, cu_seqlens)


for part in (norms, convolutions, losses, pointwise):
    part()
for kernel in compile_only.compiled:
    kernel |= compile_only.resources(kernel.pop("cubin"))
    kernel["wide_loads"] = kernel.pop("ptx").count(".v4.b32")
    print(json.dumps(kernel))
