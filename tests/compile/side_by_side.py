"""Call ops on CPU tensors without running kernels; print as JSON which kernels were compiled before the first launch, and which
at a launch. Arguments: op ..."""

import json
import sys

from tests.compile import compile_only  # isort: skip

import torch
from triton import knobs

from flame.kernels import compile_together
from flame.kernels.checking import all_cases, evaluate
from flame.kernels.delta_rule import cases as delta_rule
from flame.kernels.delta_rule.triton_op import Call
from flame.kernels.linear_attention import cases as linear_attention

CASES = {
    "delta_rule": lambda: delta_rule.make_case(delta_rule.Shape("scalar", 1, 100, 1, 32, 32)),
    "dplr": lambda: delta_rule.make_case(delta_rule.Shape("untied", 1, 100, 1, 32, 32)),
    "linear_attention": lambda: linear_attention.make_case(
        linear_attention.Shape("key", 1, 100, (1, 1, 1), 32, 32, torch.bfloat16, state=True)
    ),
}

Call.exact = lambda self: "tf32x3"  # on CPU tensors, as it is on a GPU's


def smallest(op):
    """The first bf16 case of an op."""
    return next(case for case in all_cases([op]) if "bfloat16" in case.name and not case.tune)


class Watch:
    def __init__(self):
        self.together, self.alone, self.rest = [], [], compile_together._compile
        compile_together._compile = self.compile
        knobs.runtime.jit_cache_hook = self.note

    def compile(self, launches):
        self.together += [kernel.__name__ for kernel, _ in launches]
        knobs.runtime.jit_cache_hook = None
        self.rest(launches)
        knobs.runtime.jit_cache_hook = self.note

    def note(self, fn, **about):
        self.alone.append(fn.name)


def main(words):
    watch = Watch()
    for word in words:
        case = CASES[word]() if word in CASES else smallest(word)
        inputs = case.inputs(torch.device("cpu"), 0)
        if word in ("delta_rule", "dplr"):  # in training nothing comes back through the final state
            outputs = case.run({name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}, "triton")
            torch.autograd.backward([outputs["o"]], [torch.ones_like(outputs["o"])])
        else:
            evaluate(case, inputs, "triton")
        launched = [kernel["name"] for kernel in compile_only.compiled]
        print(json.dumps({"op": word, "together": watch.together, "alone": watch.alone, "launched": launched}))
        watch.together, watch.alone = [], []
        compile_only.compiled.clear()


main(sys.argv[1:])
