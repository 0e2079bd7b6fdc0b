"""Where figures go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from flame.config.sections import JobConfig

logger = logging.getLogger(__name__)

JSONL = "metrics.jsonl"


class Writer(Protocol):
    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One line of JSON a reading. A resumed run drops the lines of steps that it will do again."""

    def __init__(self, path: Path, resumed_from: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if step_of(line) <= resumed_from]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(f"{line}\n" for line in kept))
            os.replace(aside, path)
        self.file = path.open("a")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    def __init__(self, folder: Path, resumed_from: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=resumed_from + 1 if resumed_from else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Continues the same W&B run after a resume: its id is kept beside the run."""

    def __init__(self, folder: Path, job: JobConfig, config: dict[str, Any]) -> None:
        import wandb

        marker = folder / "wandb_id"
        run_id = marker.read_text().strip() if marker.is_file() else None
        self.run = wandb.init(id=run_id, resume="allow", config=config, dir=str(folder), notes=job.job.description)
        marker.write_text(self.run.id)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


def open_writers(job: JobConfig, folder: Path, resumed_from: int, config: dict[str, Any]) -> list[Writer]:
    """What the [metrics] section asks for; a missing package is reported and left out."""
    writers: list[Writer] = [JsonLines(folder / JSONL, resumed_from)]
    if job.metrics.enable_tensorboard:
        try:
            writers.append(TensorBoard(folder / job.metrics.save_tb_folder, resumed_from))
        except ImportError:
            logger.warning("metrics.enable_tensorboard: the package tensorboard is not installed; going on without.")
    if job.metrics.enable_wandb:
        try:
            writers.append(WeightsAndBiases(folder, job, config))
        except ImportError:
            logger.warning("metrics.enable_wandb: the package wandb is not installed; going on without.")
    return writers
