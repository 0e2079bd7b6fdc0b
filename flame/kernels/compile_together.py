"""An op's kernels compiled side by side at its first call.

Triton compiles a kernel when it is first launched, so an op's kernels would be compiled one after the other on one core, and
their launchers, which Triton 3.6 has the C compiler make. So the first call of a kind goes through the op once on meta
tensors, launching nothing: before Triton compiles it asks `knobs.runtime.jit_cache_hook`, which notes the kernel. Threads then
compile what was noted; LLVM, ptxas and the C compiler, where the time goes, do not hold Python's lock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Launch = tuple[Any, str]  # a kernel and, as text, what it is specialized for

_done: set[Hashable] = set()
_lock = threading.Lock()
_thread = threading.local()


def compiled_together(then: Callable[[tuple[Any, ...], Any], object] | None = None) -> Callable[[Function], Function]:
    """Decorates a function of tensors, None and plain values that launches kernels.

    A kind of call is told by the tensors' dtypes and sizes after the second, by what is None, and by flags. What the first call
    of a kind does not launch, such as kernels for longer rows, is compiled when it is launched.

    Args:
        then: (inputs, outputs), what follows the function and is to be compiled with it: the backward. Gets meta tensors.
    """

    def decorate(function: Function) -> Function:
        def rehearse(inputs: tuple[Any, ...]) -> None:
            inputs = tuple(_meta(x) for x in inputs)
            outputs = function(*inputs)
            if then is not None:
                then(inputs, outputs)

        @functools.wraps(function)
        def run(*inputs: Any) -> Any:
            kind = (function, *(_kind(x) for x in inputs))
            if kind not in _done and not _rehearsing():
                _prepare(kind, lambda: rehearse(inputs))
            return function(*inputs)

        return run  # type: ignore[return-value]

    return decorate


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return (*x.shape[2:], x.dtype)
    return x if isinstance(x, bool | str) else type(x)


def _meta(x: Any) -> Any:
    """A tensor of x's sizes and strides without data, which nothing can read and no kernel may be launched on."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def _rehearsing() -> bool:
    return getattr(_thread, "rehearsing", False)


def _prepare(kind: Hashable, rehearse: Callable[[], None]) -> None:
    from triton import knobs

    if knobs.runtime.interpret:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # other threads must not disturb that
        return
    with _lock:
        if kind not in _done:
            _compile(_launches(rehearse))
            _done.add(kind)


def _launches(rehearse: Callable[[], None]) -> list[Launch]:
    """Kernels that the rehearsed call would have to compile."""
    found: dict[Any, Launch] = {}
    with _launching_nothing(found), contextlib.suppress(Exception):  # what is wrong shows at the call itself
        rehearse()
    return list(found.values())


@contextlib.contextmanager
def _launching_nothing(found: dict[Any, Launch]) -> Iterator[None]:
    """In this thread, kernels are not launched, and noted in `found` if they are not compiled."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    launch, previous = JITFunction.run, knobs.runtime.jit_cache_hook

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, warmup=warmup or _rehearsing(), **options)

    def note(**about: Any) -> bool | None:
        if not _rehearsing():
            return previous(**about) if previous else None
        fn, compiled = about["fn"], about["compile"]
        found[fn.name, compiled["key"]] = (fn.jit_function, compiled["specialization_data"])
        return True  # do not compile

    _thread.rehearsing, JITFunction.run, knobs.runtime.jit_cache_hook = True, run, note
    try:
        yield
    finally:
        _thread.rehearsing, JITFunction.run, knobs.runtime.jit_cache_hook = False, launch, previous


def _compile(launches: list[Launch]) -> None:
    if len(launches) < 2:
        return  # the launch itself does
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda launch: _preload(launch[0], launch[1], device), launches))


def _preload(kernel: Any, specialization: str, device: int | None) -> None:
    """Compile a kernel, and where there is a GPU load it and make its launcher."""
    with contextlib.suppress(Exception):  # the launch does it again, and says what is wrong
        if device is not None:
            torch.cuda.set_device(device)  # every thread has its own
        compiled = kernel.preload(specialization)
        if device is not None:
            _ = compiled.run
