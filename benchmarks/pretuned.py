"""Peers' autotuning cut in two: first every process compiles a share of the configurations, later one process times them.

Compiling is most of the minutes that autotuning takes, and it can be done beside other work, or on another machine
(`benchmarks.precompile`); timing needs the GPU alone. Both halves name what they did in one record file, so that the second
never compiles what the first did not reach.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

PEERS = ("fla.", "mamba_ssm.")


def compile_share(index: int, count: int, record: Path) -> None:
    """From now on autotuners run one configuration in `count` once, without timing it, and append it to `record`."""
    from triton.runtime.autotuner import Autotuner

    record.parent.mkdir(parents=True, exist_ok=True)

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if zlib.crc32(str(config).encode()) % count != index:
            return [float("inf")] * 3
        times = original(self, *args, config=config, **meta)
        if times[0] < float("inf"):
            with record.open("a") as file:
                file.write(name_of(self, config) + "\n")
        return times

    original = untouched(Autotuner)
    Autotuner._bench = bench
    replace_timer(run_once)


def run_once(tuner: Any, call: Any, quantiles: Any = None) -> list[float]:
    """In place of timing a configuration: load it, and build what launches it."""
    call()
    return [1.0, 1.0, 1.0]


def share_compiled() -> None:
    """Have Triton file peers' kernels under keys that two builds of one version, such as two Pythons' wheels, share."""
    from triton.compiler import compiler

    original = compiler.get_cache_key

    def key(source: Any, backend: Any, options: Any, env_vars: Any) -> str:
        if not getattr(getattr(source, "fn", None), "__module__", "").startswith(PEERS):
            return original(source, backend, options, env_vars=env_vars)
        return f"precompiled-{source.hash()}-{backend.hash()}-{options.hash()}-{sorted(env_vars.items())}"

    compiler.get_cache_key = key


def tune_recorded(record: Path, warmup: int = 2, rep: int = 8, timed: bool = True) -> None:
    """From now on autotuners time what `record` names, `rep` ms each, or run it once; of a kernel that it does not know, they
    take the first configuration and say so. What ran once is what a later timed run takes of the record."""
    import triton
    from triton.runtime.autotuner import Autotuner

    ran = record.with_suffix(".ran")
    record = ran if timed and ran.exists() else record
    known = set(record.read_text().splitlines()) if record.exists() else set()
    kernels = {line.split("|")[0] for line in known}
    untuned: set[str] = set()

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        name = name_of(self, config)
        kernel = name.split("|")[0]
        if known and kernel not in kernels and kernel not in untuned:
            untuned.add(kernel)
            print(f"not tuned, its first configuration is used: {kernel}", flush=True)
        if known and name not in known:
            return [float("inf")] * 3
        times = original(self, *args, config=config, **meta)
        if not timed and times[0] < float("inf"):
            with ran.open("a") as file:
                file.write(name + "\n")
        return times

    def time(self: Any, call: Any, quantiles: Any = None) -> Any:
        return triton.testing.do_bench(call, warmup=warmup, rep=rep, quantiles=quantiles)

    original = untouched(Autotuner)
    Autotuner._bench = bench
    replace_timer(time if timed else run_once)


def untouched(tuner: Any) -> Any:
    """Triton's own `_bench`, however often it has been replaced here."""
    if not hasattr(tuner, "_bench_of_triton"):
        tuner._bench_of_triton = tuner._bench
    return tuner._bench_of_triton


def name_of(tuner: Any, config: Any) -> str:
    return f"{tuner.base_fn.__name__}|{config}"


def replace_timer(timer: Any) -> None:
    from triton.runtime.autotuner import Autotuner

    def bound(self: Any) -> Any:
        return lambda call, quantiles=None: timer(self, call, quantiles)

    Autotuner.do_bench = property(bound)
