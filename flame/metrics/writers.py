"""Where figures go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol, TextIO

from flame.config.sections import JobConfig

logger = logging.getLogger(__name__)

JSONL = "metrics.jsonl"
LEFT_BEHIND = "metrics.left_behind.jsonl"


class Writer(Protocol):
    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: what was written of later steps does not belong to it any more."""

    def close(self) -> None: ...


class JsonLines:
    """One line of JSON a reading. A run that resumes moves the lines of steps that it will do again to another file."""

    def __init__(self, path: Path, resumed_from: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file: TextIO | None = None
        self.rewind(resumed_from)

    def write(self, step: int, figures: dict[str, float]) -> None:
        if self.file is None:
            self.file = self.path.open("a")
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()

    def rewind(self, step: int) -> None:
        self.close()
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in lines if step_of(line) <= step]
        left = [line for line in lines if step_of(line) > step]
        if not left:
            return
        with self.path.with_name(LEFT_BEHIND).open("a") as file:
            file.writelines(f"{line}\n" for line in left)
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(aside, self.path)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class TensorBoard:
    """TensorBoard is told which step a run resumed from, and hides the later steps that were there."""

    def __init__(self, folder: Path, resumed_from: int) -> None:
        self.folder = folder
        self.writer = self.open(resumed_from)

    def open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self.close()
        self.writer = self.open(step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Continues the same W&B run after a resume: its id is kept beside the run.

    W&B drops what comes with an earlier step than its own counter has reached, so a resumed run would show nothing until
    it is past where it stopped. Our step is therefore a figure of its own, against which the others are drawn.
    """

    def __init__(self, folder: Path, job: JobConfig, config: dict[str, Any]) -> None:
        import wandb

        marker = folder / "wandb_id"
        run_id = marker.read_text().strip() if marker.is_file() else None
        self.run = wandb.init(id=run_id, resume="allow", config=config, dir=str(folder), notes=job.job.description)
        marker.write_text(self.run.id)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"step": step, **figures})

    def rewind(self, step: int) -> None:
        """What was sent stays."""

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
