"""Compile the tiled attention kernels for sm_90 and print what each needs, as JSON.

Arguments: H:Hk:K:V:dtype[:packed|:window|:sink|:plain|:part|:path] ...
"""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels.path_attention import path_attention
from flame.kernels.path_attention.triton_parts import TritonParts
from flame.kernels.softmax_attention import triton_flash


def main(words):
    for word in words:
        H, Hk, K, V, dtype, *options = word.split(":")
        meta = {"device": "cpu", "dtype": getattr(torch, dtype)}
        q, k, v = (
            torch.zeros(1, 256, int(n), int(d), **meta, requires_grad=True) for n, d in ((H, K), (Hk, K), (Hk, V))
        )
        if "part" in options:
            q, k, v = (x.detach().squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))
            parts, bias = TritonParts(), torch.zeros(int(Hk), 256)
            o, lse = parts.attend(q, k, v, bias, 0.1)
            parts.differentiate((q, o, o, lse), k, v, bias, 0.1)
            parts.merge(o.float(), lse, o, lse)
            parts.inverse(torch.zeros(1, 64, 64))
            report(word)
            continue
        if "path" in options:
            compile_path(int(H), int(Hk), int(K), getattr(torch, dtype))
            report(word)
            continue
        gates = torch.zeros(1, 256, int(H), requires_grad=True)
        bounds = torch.tensor([0, 100, 256], dtype=torch.int32) if "packed" in options else None
        plain = not {"window", "sink", "plain"}.isdisjoint(options)
        o = triton_flash.tiled_attention(
            q, k, v, log_forget=None if plain else gates, cu_seqlens=bounds, scale=0.1, prune=0.0 if plain else 1e-6,
            sink=torch.zeros(int(H)) if "sink" in options else None, window=100 if "window" in options else None,
        )  # fmt: skip
        o.backward(torch.ones_like(o))
        report(word)


def compile_path(H, Hk, K, dtype, tokens=2100):
    """Three levels."""
    call = {name: torch.zeros(1, tokens, heads, K, dtype=dtype) for name, heads in (("q", H), ("k", Hk), ("v", Hk))}
    call |= {"w": torch.zeros(1, tokens, Hk, K), "beta": torch.zeros(1, tokens, Hk)}
    call["log_forget"] = torch.zeros(1, tokens, H)
    leaves = {name: x.requires_grad_() for name, x in call.items()}
    o = path_attention(**leaves, backend="triton")
    o.backward(torch.ones_like(o))


def report(word):
    for kernel in compile_only.compiled:
        kernel |= compile_only.resources(kernel.pop("cubin"))
        kernel["wgmma"] = kernel.pop("ptx").count("wgmma.mma_async")
        print(json.dumps({"case": word, **kernel}))
    compile_only.compiled.clear()


main(sys.argv[1:])
