"""Seconds to the first forward and backward of an op in a fresh process with an empty compile cache.

    python -m benchmarks.cold_start --out results/cold --op linear_attention --case B8

Every case gets its own process; importing torch and opening the GPU are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import differentiate
from benchmarks.kernels import OURS, find


def first_call(name: str, implementation: str) -> float:
    benchmark = next(each for each in find([], [name]) if each.name == name)
    device = torch.device("cuda")
    torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device)).sum().item()
    inputs = benchmark.inputs(device, 0, False)
    call = benchmark.implementations[implementation]()
    torch.cuda.synchronize()
    start = time.perf_counter()
    differentiate(benchmark, call, inputs, None)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_fresh_process(name: str, implementation: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.cold_start", "--child", name, "--implementation", implementation]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    words = done.stdout.split()
    if done.returncode or not words:
        print(f"{name}: {done.stderr.splitlines()[-1:]}")
        return float("nan")
    return float(words[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--implementation", default=OURS)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; more than one slows each a little")
    parser.add_argument("--out", type=Path, default=Path("outputs/cold"))
    parser.add_argument("--child", default="")
    args = parser.parse_args()
    if args.child:
        print(first_call(args.child, args.implementation))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    names = [benchmark.name for benchmark in find(args.op, args.case)]
    with ThreadPoolExecutor(args.jobs) as pool:
        seconds = dict(zip(names, pool.map(lambda name: in_fresh_process(name, args.implementation), names)))
    for name, value in seconds.items():
        print(f"{value:6.2f} s  {name}")
    (args.out / "cold_start.json").write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
