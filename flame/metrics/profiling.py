"""Windows of the torch profiler and memory snapshots, as the [profiling] section asks."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch

from flame.config.sections import Profiling

logger = logging.getLogger(__name__)

MAX_SNAPSHOT_ENTRIES = 100_000


class Profiler:
    """Traces of `profiler_active` steps every `profile_freq` steps, one file a rank, and allocator snapshots with them.

    Use as a context around the training loop and call `step` after every step.
    """

    def __init__(self, options: Profiling, folder: Path, rank: int, device: torch.device) -> None:
        self.options, self.folder, self.rank = options, folder, rank
        self.snapshots = options.enable_memory_snapshot and device.type == "cuda"
        self.steps = 0
        self.trace: torch.profiler.profile | None = None
        if options.enable_profiling:
            active, warmup = options.profiler_active, options.profiler_warmup
            wait = max(options.profile_freq - active - warmup, 0)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.trace = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active),
                on_trace_ready=self.write_trace,
                record_shapes=True,
            )

    def __enter__(self) -> Profiler:
        if self.snapshots:
            torch.cuda.memory._record_memory_history(max_entries=MAX_SNAPSHOT_ENTRIES)
        if self.trace is not None:
            self.trace.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.snapshots and kind is not None and issubclass(kind, torch.OutOfMemoryError):
            self.write_snapshot("out_of_memory")
        if self.trace is not None:
            self.trace.stop()

    def step(self) -> None:
        self.steps += 1
        if self.trace is not None:
            self.trace.step()
        if self.snapshots and self.steps % self.options.profile_freq == 0:
            self.write_snapshot(f"step_{self.steps}")

    def write_trace(self, trace: torch.profiler.profile) -> None:
        place = self.folder / self.options.save_traces_folder / f"step_{self.steps}"
        place.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(place / f"rank_{self.rank}.json.gz"))
        logger.info("wrote a trace to %s", place)

    def write_snapshot(self, name: str) -> None:
        place = self.folder / self.options.save_memory_snapshot_folder / name
        place.mkdir(parents=True, exist_ok=True)
        with (place / f"rank_{self.rank}.pickle").open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        logger.info("wrote a memory snapshot to %s", place)
