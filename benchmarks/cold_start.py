"""Seconds to the first forward and backward of an op in a fresh process with an empty compile cache.

    python -m benchmarks.cold_start --op linear_attention --case "B=8" --jobs 4 --out results/cold

takes our ops' cases from `flame.kernels.checking`: those of production shapes, or the largest of an op that has none. With
`--implementation fla` it takes those of `benchmarks/cases` and the peer. Every case gets its own process; importing torch and
opening the GPU are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.harness import differentiate
from benchmarks.kernels import OURS, find
from flame.kernels.checking import Case, all_cases, evaluate, named_cases


def of_peer(name: str, implementation: str) -> Callable[[], object]:
    benchmark = next(each for each in find([], []) if each.name == name)
    inputs, call = benchmark.inputs(torch.device("cuda"), 0, False), benchmark.implementations[implementation]()
    return lambda: differentiate(benchmark, call, inputs, None)


def of_ours(name: str) -> Callable[[], object]:
    op, _, rest = name.partition(": ")
    case = named_cases()[op, rest]
    inputs = case.inputs(torch.device("cuda"), 0)
    return lambda: evaluate(case, inputs, None)


def first_call(name: str, implementation: str) -> float:
    x = torch.ones(64, 64, device="cuda")
    x.mm(x).sum().item()
    call = of_ours(name) if implementation == OURS else of_peer(name, implementation)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_fresh_process(name: str, implementation: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.cold_start", "--child", name, "--implementation", implementation]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    words = done.stdout.split()
    if done.returncode or not words:
        print(f"{name}: {done.stderr.splitlines()[-1:]}", flush=True)
        return float("nan")
    return float(words[-1])


def production(cases: list[Case]) -> list[Case]:
    """The cases to tune, or of an op without any the one with the largest sizes in its name."""
    tuned = [case for case in cases if case.tune]
    return tuned or [max(cases, key=lambda case: math.prod(int(n) for n in re.findall(r"=(\d+)", case.name)))]


def names_of(ops: list[str], texts: list[str], implementation: str) -> list[str]:
    if implementation != OURS:
        return [benchmark.name for benchmark in find(ops, texts)]
    groups = [production(list(cases)) for _, cases in groupby(all_cases(ops), lambda case: case.op)]
    names = [f"{case.op}: {case.name}" for cases in groups for case in cases]
    return [name for name in names if not texts or any(text in name for text in texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains one of these texts")
    parser.add_argument("--implementation", default=OURS)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; more than one slows each a little")
    parser.add_argument("--out", type=Path, default=Path("outputs/cold"))
    parser.add_argument("--child", default="")
    args = parser.parse_args()
    if args.child:
        print(first_call(args.child, args.implementation))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        names = names_of(args.op, args.case, args.implementation)
        runs = {pool.submit(in_fresh_process, name, args.implementation): name for name in names}
        for run in as_completed(runs):
            seconds[runs[run]] = run.result()
            print(f"{run.result():6.2f} s  {runs[run]}", flush=True)
            (args.out / "cold_start.json").write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
