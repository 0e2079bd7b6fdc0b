"""Compile the kernels of sparse attention for sm_90 and print what each needs, as JSON. Arguments: op:H:Hk:D:dtype ..."""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels.block_attention import block_attention


def block(H, Hk, D, dtype, size=64, heads=None):
    leaves = [torch.empty(1, 256, h, D, dtype=dtype, requires_grad=True) for h in (H, Hk, Hk)]
    indices = torch.zeros(1, 256, heads or Hk, 4, dtype=torch.int32)
    block_attention(*leaves, indices, block_size=size, backend="triton").sum().backward()


def chunks(H, Hk, D, dtype):
    block(H, Hk, D, dtype, size=256, heads=H)


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
