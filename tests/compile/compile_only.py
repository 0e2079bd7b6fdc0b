"""Compile every Triton kernel that a call launches, for sm_90, without running it and without a GPU.

Import before any kernel module, in a process of its own with TRITON_INTERPRET unset. Launches then only compile, so that
an op called on meta or CPU tensors builds exactly the kernels that it would run.
"""

import os

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise RuntimeError("compile_only needs TRITON_INTERPRET unset before triton is imported")

import subprocess
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 232448  # bytes a block may use on Hopper
compiled = []  # one dictionary per launch


class _Driver:
    """As much of a CUDA driver as launching asks for before it would touch a device."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, kind):
        return "void*"


driver.set_active(_Driver())
_run = JITFunction.run


def _compile(self, *args, grid, warmup, **kwargs):
    start = time.time()
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    if kernel is None:  # a hook has noted the launch to be left out
        return None
    compiled.append(
        {
            "name": self.fn.__name__,
            "seconds": time.time() - start,
            "shared": kernel.metadata.shared,
            "ptx": kernel.asm["ptx"],
            "cubin": kernel.asm["cubin"],
            "warps": kernel.metadata.num_warps,
        }
    )
    return kernel


JITFunction.run = _compile


def resources(cubin):
    """Registers and stack bytes of a cubin; a stack means that registers spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    words = text.replace(":", " ").split()
    return {name: int(words[words.index(name) + 1]) for name in ("REG", "STACK")}
