"""The first call of an op compiles all kernels of its forward and backward side by side, and leaves none to its launches."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


FAST = ["linear_attention", "elementwise_scan"]
SLOW = [
    "delta_rule", "dplr", "selective_scan", "log_gate", "log_linear_attention", "mesa", "polynomial_attention",
    "softmax_attention", "forgetting_attention", "path_attention", "block_attention", "native_sparse_attention",
]  # fmt: skip


@pytest.mark.parametrize("ops", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_first_call_compiles_everything_before_a_launch(ops, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.compile.side_by_side", *ops]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [each["op"] for each in found] == ops
    compiled = set()  # an op may launch what one before it has compiled
    for each in found:
        compiled |= {*each["together"]}
        assert each["alone"] == [] and len(each["together"]) >= 2
        assert {*each["launched"]} <= compiled
