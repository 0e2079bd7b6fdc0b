"""Registered ops without their dispatch cost where nobody looks at it.

An op registered with torch.library can be seen by the compiler, fake tensors, selective checkpointing and FLOP counters, and
costs the host about 100 us a forward and backward for it: as long as some kernels run. In plain eager execution, with plain
tensors and no dispatch mode, `Direct` calls the same functions through an autograd.Function instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(x: Tensor) -> bool:
    """Whether a call on x may skip dispatch: a plain tensor with data, no compiler at work, no dispatch mode."""
    return type(x) in _PLAIN and not x.is_meta and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


class Direct:
    """One op with both ways to call it.

    Args:
        registered: the torch.library op.
        function: its implementation, with the same arguments; the first is a tensor.
        setup_context, backward: its autograd formula, as given to `register_autograd`; None for an op without gradient.
    """

    def __init__(
        self,
        registered: Callable[..., Any],
        function: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.registered = registered
        self.function = function
        self.differentiable: Callable[..., Any] = function
        if setup_context is not None and backward is not None:
            # setup_context inside forward: given to torch on its own, every call binds its arguments by inspection (60 us).
            def forward(ctx: Any, *args: Any) -> Any:
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            self.differentiable = type(function.__name__, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> Any:
        if not unobserved(args[0]):
            return self.registered(*args)
        return self.differentiable(*args) if torch.is_grad_enabled() else self.function(*args)
