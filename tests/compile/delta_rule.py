"""Compile the kernels of the delta rule for sm_90 and print what each needs, as JSON. Arguments: kind:K:V:tokens ..."""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch

from flame.kernels import tiles
from flame.kernels.delta_rule.cases import Shape, make_case
from flame.kernels.delta_rule.triton_dplr_op import dplr_triton  # noqa: F401  (registers the operators)
from flame.kernels.delta_rule.triton_op import delta_rule_triton  # noqa: F401


def main(words):
    shipped = tiles.shipped_tiles("delta_rule", "NVIDIA H200")
    for word in words:
        kind, K, V, tokens = word.split(":")
        case = make_case(Shape(kind, 1, int(tokens), 1, int(K), int(V)))
        inputs = case.inputs(torch.device("cpu"), 0)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        with tiles.using("delta_rule", {key: shipped[key] for key in case.keys if key in shipped}):
            outputs = case.run(leaves, "triton")
            torch.autograd.backward(list(outputs.values()), [torch.ones_like(x) for x in outputs.values()])
        for kernel in compile_only.compiled:
            kernel |= compile_only.resources(kernel.pop("cubin"))
            kernel["wgmma"] = kernel.pop("ptx").count("wgmma.mma_async")
            print(json.dumps({"case": word, **kernel}))
        compile_only.compiled.clear()


main(sys.argv[1:])
