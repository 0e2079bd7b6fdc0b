"""Compile the kernels of linear attention for sm_90 and print what each needs, as JSON. Arguments: kind:K:V:dtype[:heads] ...

With `heads`, that many share one of queries and keys, and gradients are made by `triton_roles`.
"""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels import tiles
from flame.kernels.linear_attention.cases import Shape, make_case
from flame.kernels.linear_attention.triton_op import linear_attention_triton  # noqa: F401  (registers the operators)

ROLES = {"FORM": 2, "BV": 64, "num_warps": 4, "num_stages": 2}


def main(words):
    shipped = tiles.shipped_tiles("linear_attention", "NVIDIA H200")
    for word in words:
        kind, K, V, dtype, *heads = word.split(":")
        shape = Shape(
            kind, 1, 128, (1, 1, int(heads[0]) if heads else 1), int(K), int(V), getattr(torch, dtype), state=True
        )
        case = make_case(shape)
        inputs = case.inputs(torch.device("cpu"), 0)
        leaves = {name: x.requires_grad_(name not in case.constant) for name, x in inputs.items()}
        choices = {key: shipped[key] for key in case.keys if key in shipped}
        if heads:
            choices |= {key: ROLES for key in case.keys if key.startswith("backward")}
        with tiles.using("linear_attention", choices):
            outputs = case.run(leaves, "triton")
            torch.autograd.backward(list(outputs.values()), [torch.ones_like(x) for x in outputs.values()])
        for kernel in compile_only.compiled:
            kernel |= compile_only.resources(kernel.pop("cubin"))
            kernel["wgmma"] = kernel.pop("ptx").count("wgmma.mma_async")
            print(json.dumps({"case": word, **kernel}))
        compile_only.compiled.clear()


main(sys.argv[1:])
