"""Saving and loading of a run's state."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flame.checkpoint import storage
from flame.checkpoint.staging import HostCopies, Staged
from flame.checkpoint.state import (
    MODEL,
    OBJECTS,
    Stateful,
    agree,
    check_fits,
    gather_from_all,
    gather_objects,
    is_foreign,
    load_objects,
    read_tensors,
    shapes_on_all_ranks,
    tensors_of,
    write_tensors,
)
from flame.config.sections import Checkpoint
from flame.errors import CheckpointError, unknown_name
from flame.models.hf import DTYPES, load_weights

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
STORAGE_ADVICE = "Free space, or make the folder writable."
SLOWEST_WRITER = timedelta(hours=2)  # ranks wait for one another's files


class CheckpointManager:
    """Checkpoints of one run below `folder / options.folder`.

    A save that fails (full disk, read-only folder) is reported and training goes on: the weights in memory and the
    checkpoints on disk are untouched. The next one is tried as usual; only the last save of a run raises.

    Args:
        options: the [checkpoint] section.
        folder: the run's folder.
        states: parts by name; `model` is the module, the others give and take state dictionaries (`state.Stateful`).
        files: texts kept in every checkpoint by file name: the resolved job, the model's config.json, the tokenizer.
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
        self.group = dist.new_group(backend="gloo", timeout=SLOWEST_WRITER)
        self.writers = dist.new_group(backend="gloo", timeout=SLOWEST_WRITER)
        pinned = options.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        self.host = HostCopies(pinned)
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
            self.begin(step, weights_only)
            tensors = self.weights() if weights_only else self.tensors(self.states)
            save = PendingSave(self, step, weights_only)
            if self.options.async_mode == "disabled" or last:
                save.write(tensors)
            else:
                save.start(self.stage(tensors))
                self.pending = save
        except CheckpointError as error:
            return self.report_failure(step, error, raise_failure=last)
        return True

    def begin(self, step: int, weights_only: bool) -> None:
        """Make the folder and write all but the tensors into it."""
        objects, problem = gather_objects({} if weights_only else self.states, self.group), ""
        if self.is_writer:
            try:
                folder = storage.begin(self.root, step)
                torch.save(objects, folder / OBJECTS)
                for name, text in self.files.items():
                    (folder / name).write_text(text, encoding="utf-8")
            except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
                problem = str(error)
        self.raise_together(problem, f"cannot write {storage.temporary_folder(self.root, step)}", STORAGE_ADVICE)

    def raise_together(self, problem: str, what: str, advice: str) -> None:
        """Raise on every rank what any rank ran into, so that none waits for another in vain."""
        found = agree(problem, self.group)
        if found:
            raise CheckpointError(f"{what}: {found}. {advice}")

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

    def stage(self, tensors: dict[str, Tensor]) -> Staged:
        """Copies in host memory, which later updates do not reach."""
        staged, problem = Staged({}, {}, None), ""
        try:
            staged = self.host.take(tensors)
        except RuntimeError as error:  # out of host memory, or of what may be pinned
            problem = str(error)
        self.raise_together(problem, "no copy in host memory", 'Use checkpoint.async_mode = "disabled".')
        return staged

    def maybe_wait_for_staging(self) -> None:
        """For callers that wait before an update. There is nothing to wait for: copies come first (`HostCopies`)."""

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
            storage.discard(self.root, step)
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

        A run that has none yet starts from `initial_load_path`, if that is given. Of step 0, before any training, only
        the weights are taken, so that it may come from `flame convert` or from a job with another optimizer.

        Returns:
            The step, or None when the run begins.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        self.finish_pending(raise_failure=False)
        found = self.choose(step) if self.options.enable else None
        if found is not None:
            parts = self.states if found > 0 else {MODEL: self.states[MODEL]}
            self.load_parts(storage.step_folder(self.root, found), self.wanted(parts))
        elif self.options.initial_load_path:
            self.load_initial(Path(self.options.initial_load_path))
        return found

    def choose(self, step: int) -> int | None:
        """The step to load, the same on all ranks: `step`, or the newest that is complete and holds everything."""
        candidates = [entry for entry in self.candidates(step) if entry.step == 0 or not entry.weights_only]
        for entry in candidates:
            folder = storage.step_folder(self.root, entry.step)
            problem = self.damage(folder)
            if not problem:
                return entry.step
            if step >= 0:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged: {problem}. Set checkpoint.load_step to another step."
                )
            if self.is_writer:
                logger.warning("Checkpoint %s is damaged: %s. Trying the one before it.", folder, problem)
        if candidates:  # starting from nothing would waste the run that they are left from
            raise CheckpointError(
                f"every checkpoint in {self.root} is damaged; the log names what is wrong with each. Move the folder "
                f"away to start anew, or set checkpoint.initial_load_path to a good checkpoint."
            )
        return None

    def candidates(self, step: int) -> list[storage.Published]:
        """Checkpoints to try in turn, as rank 0 sees them."""
        found: list[Any] = [[], ""]
        if self.is_writer:
            try:
                storage.tidy(self.root)
                if step >= 0:
                    storage.require_step(self.root, step)
                found[0] = [entry for entry in reversed(storage.published(self.root)) if step in (-1, entry.step)]
                self.refuse_weights_only(found[0])
            except (OSError, CheckpointError) as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[1]:
            raise CheckpointError(found[1])
        return found[0]

    def refuse_weights_only(self, entries: list[storage.Published]) -> None:
        """Raise when the newest checkpoint has no optimizer state; going back further is for the user to decide."""
        if not entries or not entries[0].weights_only or entries[0].step == 0:
            return
        older = [entry.step for entry in entries if not entry.weights_only]
        resumable = f", or checkpoint.load_step = {older[0]} to go back to what can be resumed" if older else ""
        raise CheckpointError(
            f"checkpoint {storage.step_folder(self.root, entries[0].step)} holds weights only "
            f"(checkpoint.last_save_model_only), so the run cannot be resumed from it. To train its weights further: "
            f"another job.dump_folder with this folder as checkpoint.initial_load_path{resumable}."
        )

    def damage(self, folder: Path) -> str:
        """What is wrong with a checkpoint, or nothing; ranks share the reading."""
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        return agree(storage.damage(folder, rank, ranks) or "", self.group)

    def load_initial(self, path: Path) -> None:
        """Start from a Hugging Face folder, or from a checkpoint (`.../step-N`): its weights, or all of its state.

        Of a checkpoint that another trainer wrote with torch only the weights are taken, and cannot be verified.
        """
        model = self.states[MODEL]
        is_hf = (path / CONFIG_FILE).is_file() and not (path / storage.MANIFEST).is_file()
        if self.options.initial_load_in_hf or is_hf:
            assert isinstance(model, nn.Module)
            load_weights(model, path)
            return
        problem = "" if is_foreign(path) and self.options.initial_load_model_only else self.damage(path)
        if problem:
            raise CheckpointError(f"checkpoint.initial_load_path = {path} cannot be used: {problem}.")
        self.load_parts(path, self.wanted({MODEL: model} if self.options.initial_load_model_only else self.states))

    def wanted(self, parts: Mapping[str, Stateful | nn.Module]) -> dict[str, Stateful | nn.Module]:
        return {name: state for name, state in parts.items() if name not in self.options.exclude_from_loading}

    def load_parts(self, folder: Path, parts: Mapping[str, Stateful | nn.Module]) -> None:
        tensors = self.tensors(parts)
        check_fits(shapes_on_all_ranks(tensors, self.group), folder, lambda: self.config_differences(folder))
        read_tensors(tensors, folder, self.group)
        objects = {} if is_foreign(folder) else load_objects(folder)
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

    def __init__(self, manager: CheckpointManager, step: int, weights_only: bool) -> None:
        self.manager, self.step, self.weights_only = manager, step, weights_only
        self.folder = storage.temporary_folder(manager.root, step)
        self.failure: CheckpointError | None = None
        self.thread: threading.Thread | None = None

    def write(self, tensors: dict[str, Tensor] | Staged) -> None:
        """Write and publish; raises CheckpointError on every rank if any of them fails."""
        try:
            write_tensors(tensors, self.folder, self.manager.writers)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {storage.free_space(self.folder)} {STORAGE_ADVICE}") from None
        files, problem = self.describe_own()
        everyone = gather_from_all((files, problem), self.manager.writers)
        files = {name: entry for own, _ in everyone for name, entry in own.items()}
        problems = [problem for _, problem in everyone if problem]
        if self.manager.is_writer and not problems:
            problems = self.publish(files)
        verdict = [problems]
        dist.broadcast_object_list(verdict, src=0, group=self.manager.writers)
        if verdict[0]:
            raise CheckpointError(f"{self.folder} could not be published: {'; '.join(verdict[0])}. {STORAGE_ADVICE}")

    def describe_own(self) -> tuple[dict[str, storage.FileEntry], str]:
        """Size and checksum of what this rank wrote, which its page cache still holds, or what went wrong."""
        try:
            own = storage.files_of_rank(self.folder, dist.get_rank(self.manager.writers))
            return storage.describe_files(self.folder, own), ""
        except OSError as error:
            return {}, str(error)

    def publish(self, files: dict[str, storage.FileEntry]) -> list[str]:
        """What went wrong, if anything."""
        try:
            storage.publish(self.manager.root, self.step, files, self.weights_only)
            storage.purge(self.manager.root, self.manager.options.keep_latest_k)
        except OSError as error:
            return [str(error)]
        return []

    def start(self, tensors: Staged) -> None:
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
