"""Compile the kernels of sparse attention for sm_90 and print what each needs, as JSON. Arguments: op:H:Hk:D:dtype ..."""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels.block_attention import block_attention
from flame.kernels.moba import moba
from flame.kernels.native_sparse_attention import SparsePattern, native_sparse_attention


def leaves(H, Hk, D, dtype):
    return [torch.empty(1, 512, h, D, dtype=dtype, requires_grad=True) for h in (H, Hk, Hk)]


def block(H, Hk, D, dtype):
    indices = torch.zeros(1, 512, Hk, 4, dtype=torch.int32)
    block_attention(*leaves(H, Hk, D, dtype), indices, block_size=64, backend="triton").sum().backward()


def chunks(H, Hk, D, dtype):
    moba(*leaves(H, Hk, D, dtype), chunk_size=256, topk=3, backend="triton").sum().backward()


def nsa(H, Hk, D, dtype):
    gates = torch.empty(1, 512, H, 3, dtype=dtype, requires_grad=True)
    native_sparse_attention(
        *leaves(H, Hk, D, dtype), gates, SparsePattern(64, 4, 100), backend="triton"
    ).sum().backward()


def main(words):
    for word in words:
        op, *numbers, dtype = word.split(":")
        globals()[op](*map(int, numbers), getattr(torch, dtype))
        for kernel in compile_only.compiled:
            kernel |= compile_only.resources(kernel.pop("cubin"))
            kernel["wgmma"] = kernel.pop("ptx").count("wgmma.mma_async")
            print(json.dumps({"case": word, **kernel}))
        compile_only.compiled.clear()


main(sys.argv[1:])
