"""The log of a run: lines on rank 0, a progress bar on a terminal, files."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flame.config.sections import JobConfig
from flame.metrics.throughput import Throughput
from flame.metrics.writers import Writer, open_writers

logger = logging.getLogger(__name__)

COLORS = {"step": 31, "loss": 32, "grad": 33, "lr": 35, "memory": 36, "speed": 34, "data": 37}


class MetricsLogger:
    """Readings of a run. Every rank keeps one, so that timing calls need no conditions; rank 0's writes.

    Args:
        job: the resolved job.
        folder: the run's folder.
        throughput: rates of this rank.
        resumed_from: step the run continues from, 0 for a new one.
        is_main: whether this rank prints and writes.
        config: what to keep with a W&B run.
    """

    def __init__(
        self,
        job: JobConfig,
        folder: Path,
        throughput: Throughput,
        resumed_from: int,
        is_main: bool,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.job, self.throughput, self.is_main = job, throughput, is_main
        wanted = is_main or job.metrics.save_for_all_ranks
        place = folder if is_main else folder / f"rank_{torch.distributed.get_rank()}"
        self.writers: list[Writer] = open_writers(job, place, resumed_from, dict(config or {})) if wanted else []
        self.bar = ProgressBar(job.training.steps) if is_main and sys.stderr.isatty() else None
        self.color = not job.metrics.disable_color_printing and sys.stderr.isatty()

    def step_done(self, step: int, tokens: int) -> None:
        """Count a step of `tokens` tokens over all ranks; reads nothing from the device."""
        self.throughput.step_done(tokens)
        if self.bar is not None:
            self.bar.show(step)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of a step (`loss`, `grad_norm`, `lr`, and any others) together with the rates since last time."""
        rates = self.throughput.read()
        if not self.writers:
            return
        self.write(step, {**figures, **rates})
        if self.is_main:
            self.print_line(self.line(step, figures, rates))

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Figures to the files, without a line on the terminal. A full disk is no reason to stop training."""
        for writer in self.writers:
            try:
                writer.write(step, figures)
            except OSError as error:
                logger.warning("figures of step %d were not written: %s", step, error)

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: take back what was written about later ones."""
        self.throughput.restart()
        for writer in self.writers:
            writer.rewind(step)

    def line(self, step: int, figures: Mapping[str, float], rates: Mapping[str, float]) -> str:
        parts = [
            self.paint("step", f"step: {step:>5}"),
            self.paint("loss", f"loss: {figures['loss']:>8.4f}"),
            self.paint("grad", f"grad_norm: {figures['grad_norm']:>7.3f}"),
            self.paint("lr", f"lr: {figures['lr']:.2e}"),
        ]
        if "memory_gib" in rates:
            parts.append(self.paint("memory", f"memory: {rates['memory_gib']:.2f}GiB({rates['memory_percent']:.1f}%)"))
        speed = f"tps: {round(rates['tokens_per_second']):,}  tflops: {rates['tflops']:.2f}"
        if "mfu_percent" in rates:
            speed += f"  mfu: {rates['mfu_percent']:.2f}%"
        parts.append(self.paint("speed", speed))
        parts.append(self.paint("data", f"data wait: {rates['data_wait_percent']:.1f}%"))
        return "  ".join(parts)

    def paint(self, what: str, text: str) -> str:
        return f"\033[{COLORS[what]}m{text}\033[0m" if self.color else text

    def print_line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        logger.info(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.clear()
        for writer in self.writers:
            writer.close()


class ProgressBar:
    """One line at the bottom of a terminal, redrawn at most ten times a second."""

    WIDTH = 30

    def __init__(self, total: int) -> None:
        self.total, self.started, self.shown, self.first = total, time.monotonic(), 0.0, -1

    def show(self, step: int) -> None:
        now = time.monotonic()
        self.first = step if self.first < 0 else self.first
        if now - self.shown < 0.1:
            return
        self.shown = now
        filled = round(self.WIDTH * step / max(self.total, 1))
        done = step - self.first
        left = (self.total - step) * (now - self.started) / done if done > 0 else 0.0
        text = f"[{'=' * filled}{' ' * (self.WIDTH - filled)}] {step}/{self.total}  {clock(left)} left"
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()

    def clear(self) -> None:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
