"""Compile the kernels of mesa for sm_90 and print what each needs, as JSON. Arguments: K:dtype ..."""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels.mesa.cases import Shape, make_case


def main(words):
    for word in words:
        K, dtype = word.split(":")
        case = make_case(Shape(1, 128, int(K), int(K), heads=1, dtype=getattr(torch, dtype), state=True))
        leaves = {name: x.requires_grad_() for name, x in case.inputs(torch.device("cpu"), 0).items()}
        outputs = case.run(leaves, "triton")
        torch.autograd.backward(list(outputs.values()), [torch.ones_like(x) for x in outputs.values()])
        for kernel in compile_only.compiled:
            kernel |= compile_only.resources(kernel.pop("cubin"))
            kernel["wgmma"] = kernel.pop("ptx").count("wgmma.mma_async")
            print(json.dumps({"case": word, **kernel}))
        compile_only.compiled.clear()


main(sys.argv[1:])
