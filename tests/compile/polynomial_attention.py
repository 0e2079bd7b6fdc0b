"""Compile the kernels of polynomial attention for sm_90 and print what each needs, as JSON. Arguments: d:V:dtype ..."""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels.polynomial_attention import polynomial_attention


def main(words):
    for word in words:
        d, V, dtype = word.split(":")
        widths = (int(d), int(d), int(V))
        leaves = [torch.randn(1, 1024, 1, n).to(getattr(torch, dtype)).requires_grad_() for n in widths]
        polynomial_attention(*leaves, backend="triton")[0].sum().backward()
        for kernel in compile_only.compiled:
            kernel |= compile_only.resources(kernel.pop("cubin"))
            kernel["wgmma"] = kernel.pop("ptx").count("wgmma.mma_async")
            print(json.dumps({"case": word, **kernel}))
        compile_only.compiled.clear()


main(sys.argv[1:])
