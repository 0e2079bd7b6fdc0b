"""Compile peers' autotuned kernels of benchmark cases for an H200 on a machine without a GPU.

    TRITON_CACHE_DIR=$CACHES/triton python -m benchmarks.precompile_kernels --op delta_rule --case scalar_B8 --caches $CACHES

What `benchmarks.precompile` does for whole models, for the cases of `benchmarks.kernels`. Copy the folder to the same path of
a machine with the same Triton and give `benchmarks.kernels --precompiled $CACHES`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what a peer compiles with inductor is compiled on the GPU

import torch

from benchmarks.harness import Benchmark
from benchmarks.kernels import OURS, RECORD, find
from benchmarks.precompile import compile_only, pretend
from benchmarks.pretuned import share_compiled


def launch_all(benchmark: Benchmark, implementation: str) -> None:
    """Forward and backward on tensors without memory, which compile and launch nothing."""
    inputs = benchmark.inputs(torch.device("cpu"), 0, False)
    leaves = {
        name: x.to("meta").requires_grad_(x.is_floating_point() and name not in benchmark.constant)
        for name, x in inputs.items()
    }
    out = benchmark.implementations[implementation]()(leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    torch.autograd.grad(out, wanted, torch.empty_like(out), allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="as of benchmarks.kernels")
    parser.add_argument("--case", action="append", default=[], help="as of benchmarks.kernels")
    parser.add_argument("--caches", type=Path, required=True)
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(args.caches / "triton")
    os.environ["FLA_CACHE_RESULTS"] = "0"  # nothing was timed that the peer could keep
    args.caches.mkdir(parents=True, exist_ok=True)
    pretend()
    share_compiled()
    compile_only(args.caches / RECORD)
    for benchmark in find(args.op, args.case):
        for name in benchmark.implementations:
            if name == OURS:
                continue
            start = time.perf_counter()
            try:
                launch_all(benchmark, name)
                status = "compiled"
            except Exception as error:  # the others are still compiled; the benchmark itself says what a peer cannot do
                status = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{benchmark.name}, {name}: {status}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
