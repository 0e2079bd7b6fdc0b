"""How fast a run is, and how much of the hardware's arithmetic it uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Dense rates by datasheet in TFLOP/s, (bf16 tensor cores, plain fp32), by a part of the device's name. First match counts.
PEAK_TFLOPS = {
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 NVL": (835, 60),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "H800": (989, 67),
    "H20": (148, 44),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
    "MI300X": (1307, 163),
}


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """The device's rate of matrix products in `dtype`, FLOP/s, or None when it is not known.

    MFU is then left out rather than guessed. fp32 products that may use TF32 have half the rate of bf16.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for part, rates in PEAK_TFLOPS.items() if part in name), None)
    if rates is None:
        return None
    half, single = (1e12 * rate for rate in rates)
    if dtype != torch.float32:
        return half
    return single if torch.get_float32_matmul_precision() == "highest" else half / 2


@dataclass
class Throughput:
    """Rates since the last reading, of training alone: `restart` after anything else leaves it out.

    Args:
        flops_per_token: forward and backward operations a token (`CausalLM.flops_per_token`).
        ranks: processes that share the work; rates are per rank, as users compare them.
        device: of this rank.
        dtype: of the matrix products, which decides the rate that MFU is measured against.
    """

    flops_per_token: float
    ranks: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    tokens: int = field(default=0, init=False)
    steps: int = field(default=0, init=False)
    waiting: float = field(default=0.0, init=False)
    started: float = field(default_factory=time.perf_counter, init=False)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the enclosed wait for the next batch."""
        start = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - start

    def step_done(self, tokens: int) -> None:
        """Count a step of `tokens` tokens over all ranks."""
        self.tokens += tokens
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last reading; the next interval starts now."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        rate = self.tokens / elapsed / self.ranks
        figures = {
            "tokens_per_second": rate,
            "tflops": rate * self.flops_per_token / 1e12,
            "seconds_per_step": elapsed / max(self.steps, 1),
            "data_wait_percent": 100 * self.waiting / elapsed,
        }
        peak = peak_flops(self.device, self.dtype)
        if peak is not None:
            figures["mfu_percent"] = 100 * rate * self.flops_per_token / peak
        figures.update(memory(self.device))
        self.restart()
        return figures

    def restart(self) -> None:
        """Start the next interval now, forgetting the steps and the time since the last reading."""
        self.started, self.waiting, self.tokens, self.steps = time.perf_counter(), 0.0, 0, 0


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the device since the last call, in GiB and percent of what it has."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return {"memory_gib": peak / 2**30, "memory_percent": 100 * peak / total}
