"""`flame doctor --tune`: for each production case, time every tile of every key, and keep the fastest that is right.

A tile is timed with all other keys as they are, so keys do not wait for each other: everything is compiled first, in
parallel, then timed alone on the GPU, and only then checked, from the fastest on. Kernels on trial run in processes that
they may break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flame.kernels import tiles
from flame.kernels.checking import Case, check_by_name, evaluate, named_cases
from flame.kernels.isolation import Result, run_isolated

WORTH = 0.99  # a tile enters the table when it takes less than this share of the default's time


@dataclass
class Key:
    """One key of one production case: the tiles on trial and their times in milliseconds, once known."""

    case: Case
    prover: Case
    name: str
    trials: list[tiles.Tile]
    times: list[tuple[float, int]] = field(default_factory=list)


def tune_all(cases: Iterable[Case], device: torch.device, jobs: int) -> None:
    """Tune the cases marked `tune` and write the tables of their ops."""
    keys = list(_keys(list(cases), device))
    calls = [(key, index) for key in keys for index in range(len(key.trials))]
    if jobs > 1:
        compiled = run_trials(compile_by_name, [_call(key, index, device) for key, index in calls], jobs)
        calls = [call for call, result in zip(calls, compiled) if _passed(call, result)]
    timed = run_trials(time_by_name, [_call(key, index, device) for key, index in calls], min(jobs, 1) or 1, jobs > 1)
    for (key, index), result in zip(calls, timed):
        if _passed((key, index), result):
            key.times.append((result[1], index))
            print(f"  {key.case.name}: {key.name} {dict(key.trials[index])}: {result[1]:.3f} ms", flush=True)
    chosen = _choose(keys, device, jobs)
    for op in sorted({op for op, _ in chosen}):
        entries = {key: tile for (owner, key), tile in chosen.items() if owner == op}
        path = tiles.write_tiles(op, tiles.device_name(device), entries)
        print(f"Wrote {len(entries)} entries to {path}")


def _keys(cases: Sequence[Case], device: torch.device) -> Iterator[Key]:
    provers = {(case.op, key): case for case in cases if not case.tune for key in case.keys}
    seen = set()
    for case in (case for case in cases if case.tune):
        for name, candidates in case.keys.items():
            prover = provers.get((case.op, name))
            if prover is None:
                print(f"SKIPPED {case.op}: no case proves {name!r}, so none of its tiles can be trusted.")
            elif (case.op, name) not in seen:
                seen.add((case.op, name))
                usable = [t for t in candidates if not tiles.denied(case.op, name, t, tiles.capability(device))]
                # The first trial is no tile at all: what the kernel takes by itself.
                yield Key(case, prover, name, [{}, *usable])


def _call(key: Key, index: int, device: torch.device, prove: bool = False) -> tuple[Any, ...]:
    case, tile = key.prover if prove else key.case, key.trials[index]
    return case.op, case.name, str(device), {key.name: tile} if tile else {}


def _passed(trial: tuple[Key, int], result: Result) -> bool:
    key, index = trial
    if not result[0]:
        print(f"  {key.case.name}: {key.name} {dict(key.trials[index])}: {result[1]}", flush=True)
    return result[0]


def _choose(keys: Sequence[Key], device: torch.device, jobs: int) -> dict[tuple[str, str], tiles.Tile]:
    """The fastest right tile of every key that beats the key's default, from the fastest on, all keys at once."""
    chosen: dict[tuple[str, str], tiles.Tile] = {}
    left = {}
    for key in keys:
        default = next((ms for ms, index in key.times if index == 0), float("inf"))
        left[key.case.op, key.name] = [(ms, i) for ms, i in sorted(key.times) if i and ms < WORTH * default]
    while open_keys := [key for key in keys if left[key.case.op, key.name]]:
        tried = [(key, left[key.case.op, key.name].pop(0)[1]) for key in open_keys]
        verdicts = run_trials(check_by_name, [_call(key, i, device, prove=True) for key, i in tried], jobs)
        for (key, index), (done, verdict) in zip(tried, verdicts):
            if done and verdict.ok:
                chosen[key.case.op, key.name] = key.trials[index]
                left[key.case.op, key.name] = []
                print(f"  {key.name}: {dict(key.trials[index])}", flush=True)
            else:
                why = verdict if not done else f"wrong, {verdict.worst[0]} off by {verdict.worst[1]:.1e}"
                print(f"  {key.name} {dict(key.trials[index])}: {why}", flush=True)
    return chosen


def run_trials(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, isolated: bool | None = None
) -> Iterator[Result]:
    """`run_isolated`, or in this very process for one job."""
    if jobs > 1 or isolated:
        yield from run_isolated(function, calls, jobs)
        return
    for call in calls:
        try:
            yield True, function(*call)
        except Exception as error:  # out of shared memory, compiler refusal: not a usable tile
            yield False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def compile_by_name(op: str, name: str, device: str, forced: dict[str, tiles.Tile]) -> None:
    case = named_cases()[op, name]
    with tiles.using(op, forced):
        evaluate(case, case.inputs(torch.device(device), 0), None)
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def time_by_name(op: str, name: str, device: str, forced: dict[str, tiles.Tile]) -> float:
    with tiles.using(op, forced):
        return milliseconds(named_cases()[op, name], torch.device(device))


def milliseconds(case: Case, device: torch.device) -> float:
    """Median time of forward and backward together on the GPU, without what the host costs."""
    import triton

    inputs = case.inputs(device, 0)
    with torch.no_grad():
        outputs = case.run(inputs, None)
    cotangents = {name: torch.randn_like(y) for name, y in outputs.items()}
    leaves = {n: x.requires_grad_(x.is_floating_point() and n not in case.constant) for n, x in inputs.items()}
    wanted = [x for x in leaves.values() if x.requires_grad]

    def both() -> None:
        outputs = case.run(leaves, None)
        pairs = [(y, cotangents[name]) for name, y in outputs.items() if y.requires_grad]
        torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])

    return triton.testing.do_bench_cudagraph(both, rep=5, return_mode="median")
