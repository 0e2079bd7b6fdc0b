"""An op's kernels compiled side by side at its first call.

Triton compiles a kernel when it is first launched, so the kernels of an op are compiled one after the other on one core, those
of its backward while the GPU waits in the backward. Here the first call goes through the op once without launching: before
Triton compiles it asks `knobs.runtime.jit_cache_hook`, which notes the kernel and has the launch left out. Threads then
compile what was noted; LLVM and ptxas, where the time goes, do not hold Python's lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton import knobs

_done: set[Hashable] = set()
_lock = threading.Lock()


def compile_together(op: str, inputs: tuple[Any, ...], run: Callable[[], object]) -> None:
    """Compile what `run` launches; of every op and kind of inputs only the first time.

    Args:
        op: name of the op.
        inputs: all that decides which kernels are launched; of tensors the sizes after the second and the dtype count.
        run: the op's forward and backward. No kernel may read positions that another of its kernels writes: those that
            are compiled already do run, on what the others left undone.
    """
    key = (op, *(_kind(x) for x in inputs))
    if key in _done or knobs.runtime.interpret:
        return
    with _lock:
        if key not in _done:
            _compile(_launches(run))
            _done.add(key)


def _kind(x: Any) -> Hashable:
    return (*x.shape[2:], x.dtype) if isinstance(x, Tensor) else x


def _launches(run: Callable[[], object]) -> list[tuple[Any, str]]:
    """Kernels that `run` would have to compile, with what they are specialized for."""
    found: dict[Any, tuple[Any, str]] = {}
    previous, owner = knobs.runtime.jit_cache_hook, threading.get_ident()

    def note(**about: Any) -> bool | None:
        if threading.get_ident() != owner:  # another thread's launch has to happen
            return previous(**about) if previous else None
        fn, compiled = about["fn"], about["compile"]
        found[fn.name, compiled["key"]] = (fn.jit_function, compiled["specialization_data"])
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        with contextlib.suppress(Exception):  # what is wrong shows at the launch itself
            run()
    finally:
        knobs.runtime.jit_cache_hook = previous
    return list(found.values())


def _compile(launches: list[tuple[Any, str]]) -> None:
    if len(launches) < 2:
        return  # the launch itself does
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda launch: _preload(launch[0], launch[1], device), launches))


def _preload(kernel: Any, specialization: str, device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # every thread has its own
    with contextlib.suppress(Exception):  # the launch compiles it again, and says what is wrong
        kernel.preload(specialization)
