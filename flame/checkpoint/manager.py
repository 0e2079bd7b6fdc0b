"""Saving and loading of a run's state."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from flame.checkpoint import storage
from flame.checkpoint.state import (
    MODEL,
    OBJECTS,
    Stateful,
    check_fits,
    gather_objects,
    load_objects,
    read_tensors,
    tensors_of,
    write_tensors,
)
from flame.config.sections import Checkpoint
from flame.errors import CheckpointError, unknown_name
from flame.models.hf import DTYPES, load_weights

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"


class CheckpointManager:
    """Checkpoints of one run below `folder / options.folder`.

    A save that fails (full disk, read-only folder) is reported and training goes on: the weights in memory and the
    checkpoints on disk are untouched. The next one is tried as usual; only the last save of a run raises.

    Args:
        options: the [checkpoint] section.
        folder: the run's folder.
        states: parts by name; `model` is the module, the others give and take state dictionaries (`state.Stateful`).
        files: texts kept in every checkpoint by file name, such as the resolved job and the model's config.json.
    """

    def __init__(
        self,
        options: Checkpoint,
        folder: Path,
        states: Mapping[str, Stateful | nn.Module],
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.options, self.states, self.files = options, dict(states), dict(files or {})
        self.root = folder / options.folder
        # Collectives of a save in the background must not meet those of training, nor those of the next save's start.
        self.group = dist.new_group(backend="gloo")
        self.writers = dist.new_group(backend="gloo")
        self.pending: PendingSave | None = None
        unknown = [name for name in options.exclude_from_loading if name not in self.states]
        if unknown:
            text = unknown_name("part", unknown[0], self.states)
            raise CheckpointError(f"checkpoint.exclude_from_loading: {text}")

    @property
    def is_writer(self) -> bool:
        """Rank 0 names, describes and publishes what all ranks write."""
        return dist.get_rank() == 0

    def save(self, step: int, last: bool = False) -> bool:
        """Save the state after `step`.

        Args:
            last: nothing follows: wait until it is on disk, and raise if it is not.

        Returns:
            False when nothing was saved: checkpoints are not enabled, or the save failed and the log says why.

        Raises:
            CheckpointError: the last save failed.
        """
        if not self.options.enable:
            return False
        self.finish_pending(raise_failure=False)
        weights_only = last and self.options.last_save_model_only
        try:
            folder = self.begin(step, weights_only)
            tensors = self.weights() if weights_only else self.tensors(self.states)
            save = PendingSave(self, step, folder)
            if self.options.async_mode == "disabled" or last:
                save.write(tensors)
            else:
                save.start(self.stage(tensors))
                self.pending = save
        except CheckpointError as error:
            return self.report_failure(step, error, raise_failure=last)
        return True

    def begin(self, step: int, weights_only: bool) -> Path:
        """Make the folder and write all but the tensors into it; agreed, so that no rank waits for another in vain."""
        objects = gather_objects({} if weights_only else self.states, self.group)
        folder, problem = storage.step_folder(self.root, step).with_suffix(".tmp"), ""
        if self.is_writer:
            try:
                storage.begin(self.root, step)
                torch.save(objects, folder / OBJECTS)
                for name, text in self.files.items():
                    (folder / name).write_text(text)
            except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
                problem = f"{error}"
        self.raise_together(problem, f"cannot write {folder}")
        return folder

    def raise_together(self, problem: str, what: str) -> None:
        """Raise on every rank what rank 0 ran into."""
        verdict = [problem]
        dist.broadcast_object_list(verdict, src=0, group=self.group)
        if verdict[0]:
            raise CheckpointError(f"{what}: {verdict[0]}. Free space or make the folder writable.")

    def tensors(self, parts: Mapping[str, Stateful | nn.Module]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part, state in parts.items():
            found.update(tensors_of(part, state))
        return found

    def weights(self) -> dict[str, Tensor]:
        """The model alone, in `export_dtype`."""
        dtype = DTYPES[self.options.export_dtype]
        tensors = tensors_of(MODEL, self.states[MODEL])
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def stage(self, tensors: dict[str, Tensor]) -> Any:
        """A copy in host memory, which later updates do not reach."""
        pinned = self.options.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        return stager.stage(tensors)

    def maybe_wait_for_staging(self) -> None:
        """Nothing of the live tensors is read after `save` returns, so an update need not wait; kept for its place."""

    def finish_pending(self, raise_failure: bool = True) -> bool:
        """Wait for a save in the background, if there is one; False when it failed."""
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        try:
            pending.join()
        except CheckpointError as error:
            return self.report_failure(pending.step, error, raise_failure)
        return True

    def report_failure(self, step: int, error: CheckpointError, raise_failure: bool) -> bool:
        if self.is_writer:
            storage.discard(storage.step_folder(self.root, step).with_suffix(".tmp"))
        if raise_failure:
            raise error
        logger.error(
            "Checkpoint of step %d was not saved: %s Training goes on; earlier checkpoints are intact.", step, error
        )
        return False

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: it failed.
        """
        self.finish_pending()

    def load(self, step: int = -1) -> int | None:
        """Load the newest complete checkpoint of the run, or that of `step`, into the states.

        A run that has none yet starts from `initial_load_path`, if that is given.

        Returns:
            The step, or None when the run begins.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        self.finish_pending(raise_failure=False)
        found = self.choose(step) if self.options.enable else None
        if found is not None:
            self.load_parts(storage.step_folder(self.root, found), self.wanted(self.states))
        elif self.options.initial_load_path:
            self.load_initial(Path(self.options.initial_load_path))
        return found

    def choose(self, step: int) -> int | None:
        """The step to load, decided by rank 0 for all."""
        choice: list[Any] = [None, ""]
        if self.is_writer:
            try:
                if step < 0:
                    choice[0] = storage.newest_good(self.root)
                else:
                    storage.require_good(self.root, step)
                    choice[0] = step
            except CheckpointError as error:
                choice[1] = str(error)
        dist.broadcast_object_list(choice, src=0, group=self.group)
        if choice[1]:
            raise CheckpointError(choice[1])
        return choice[0]

    def load_initial(self, path: Path) -> None:
        """Start from a Hugging Face folder, or from a checkpoint (`.../step-N`): its weights, or all of its state."""
        model = self.states[MODEL]
        if self.options.initial_load_in_hf:
            assert isinstance(model, nn.Module)
            load_weights(model, path)
            return
        problem = storage.damage(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint.initial_load_path = {path} cannot be used: {problem}.")
        self.load_parts(path, self.wanted({MODEL: model} if self.options.initial_load_model_only else self.states))

    def wanted(self, parts: Mapping[str, Stateful | nn.Module]) -> dict[str, Stateful | nn.Module]:
        return {name: state for name, state in parts.items() if name not in self.options.exclude_from_loading}

    def load_parts(self, folder: Path, parts: Mapping[str, Stateful | nn.Module]) -> None:
        tensors = self.tensors(parts)
        check_fits(tensors, folder, lambda: self.config_differences(folder))
        read_tensors(tensors, folder, self.group)
        objects = load_objects(folder)
        for name, state in parts.items():
            if objects.get(name) and not isinstance(state, nn.Module):
                state.load_state_dict(objects[name])

    def config_differences(self, folder: Path) -> str:
        """` Its config has hidden_size = 64, this one 128.` or nothing."""
        file = folder / CONFIG_FILE
        if not file.is_file() or CONFIG_FILE not in self.files:
            return ""
        there, here = json.loads(file.read_text()), json.loads(self.files[CONFIG_FILE])
        keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        pairs = ", ".join(f"{key} = {there.get(key)!r} (here {here.get(key)!r})" for key in keys)
        return f" Its model has {pairs}." if pairs else ""


class PendingSave:
    """One save: its tensors are written by all ranks, then rank 0 publishes it."""

    def __init__(self, manager: CheckpointManager, step: int, folder: Path) -> None:
        self.manager, self.step, self.folder = manager, step, folder
        self.failure: CheckpointError | None = None
        self.thread: threading.Thread | None = None

    def write(self, tensors: dict[str, Any]) -> None:
        """Write and publish; raises CheckpointError on every rank if any of them fails."""
        write_tensors(tensors, self.folder, self.manager.writers)
        problem = [self.publish() if self.manager.is_writer else ""]
        dist.broadcast_object_list(problem, src=0, group=self.manager.writers)
        if problem[0]:
            raise CheckpointError(f"{self.folder} could not be published: {problem[0]}.")

    def publish(self) -> str:
        """Empty, or what went wrong."""
        try:
            storage.publish(self.manager.root, self.step, self.folder)
            storage.purge(self.manager.root, self.manager.options.keep_latest_k)
        except OSError as error:
            return str(error)
        return ""

    def start(self, tensors: dict[str, Any]) -> None:
        """Write in the background."""

        def run() -> None:
            try:
                self.write(tensors)
            except CheckpointError as error:
                self.failure = error
            except Exception as error:  # a lost peer, say; it must reach the training thread
                self.failure = CheckpointError(f"saving {self.folder} failed: {error}.")

        # Not a daemon: an interpreter that exits in between must finish the checkpoint first.
        self.thread = threading.Thread(target=run, name=f"checkpoint-{self.step}")
        self.thread.start()

    def join(self) -> None:
        if self.thread is not None:
            self.thread.join()
        if self.failure is not None:
            raise self.failure
