"""The tiled attention kernels compile for Hopper, fit its shared memory and use its tensor cores; no GPU needed."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 232448


def compile_cases(*cases):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile.attention", *cases]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
    return kernels


def check(*cases):
    kernels = compile_cases(*cases)
    tiled = [kernel for kernel in kernels if kernel["name"].startswith("attention_")]
    assert len(tiled) == 3 * len(cases)
    assert all(kernel["wgmma"] for kernel in tiled), tiled


def test_gated_kernels_compile_for_hopper():
    check("2:1:64:64:bfloat16")


@pytest.mark.slow
def test_every_option_compiles_for_hopper():
    check("2:2:128:128:bfloat16:packed", "2:1:64:64:bfloat16:sink:window", "1:1:128:128:bfloat16:part")


@pytest.mark.slow
def test_path_compiles_for_hopper():
    kernels = compile_cases("2:1:64:64:bfloat16:path")
    walks = [kernel for kernel in kernels if kernel["name"].startswith("walk_")]
    assert len(walks) == 6  # of two levels
    assert all(kernel["wgmma"] for kernel in walks), walks
