"""How fast a run is, and how much of the hardware's arithmetic it uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Dense bf16 tensor-core rates by datasheet, FLOP/s, by a part of the device's name. First match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 rate, or None when it is not known; MFU is then left out rather than guessed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


@dataclass
class Throughput:
    """Rates since the last reading.

    Args:
        flops_per_token: forward and backward operations a token (`CausalLM.flops_per_token`).
        ranks: processes that share the work; rates are per rank, as users compare them.
        device: of this rank.
    """

    flops_per_token: float
    ranks: int
    device: torch.device
    waiting: float = field(default=0.0, init=False)
    started: float = field(default_factory=time.perf_counter, init=False)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the enclosed wait for the next batch."""
        start = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - start

    def read(self, tokens: int, steps: int) -> dict[str, float]:
        """Figures over `steps` steps of `tokens` tokens in all, over all ranks; starts the next interval."""
        now = time.perf_counter()
        elapsed = max(now - self.started, 1e-9)
        rate = tokens / elapsed / self.ranks
        figures = {
            "tokens_per_second": rate,
            "tflops": rate * self.flops_per_token / 1e12,
            "seconds_per_step": elapsed / max(steps, 1),
            "data_wait_percent": 100 * self.waiting / elapsed,
        }
        peak = peak_flops(self.device)
        if peak is not None:
            figures["mfu_percent"] = 100 * rate * self.flops_per_token / peak
        figures.update(memory(self.device))
        self.started, self.waiting = now, 0.0
        return figures

    def restart(self) -> None:
        """Leave out what happened since the last reading: validation, saving."""
        self.started, self.waiting = time.perf_counter(), 0.0


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the device since the last call, in GiB and percent of what it has."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return {"memory_gib": peak / 2**30, "memory_percent": 100 * peak / total}
