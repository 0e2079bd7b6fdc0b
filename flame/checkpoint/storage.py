"""Checkpoint folders on disk: complete or absent.

A checkpoint is written to ``step-N.tmp``, described by a manifest (size and CRC-32 of every file, written last), flushed,
renamed to ``step-N``, and only then named by ``latest``. A folder without a manifest, or one whose files do not match it,
is not a checkpoint: it is passed over, by name, and the one before it is used.

"Newest" is the one written last, not the one with the highest step: a run that went back to step 100 by
`checkpoint.load_step` continues from what it wrote since, not from the steps that it left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT_VERSION = 1
_STEP = re.compile(r"step-(\d+)$")
_TEMPORARY, _REPLACED = ".tmp", ".old"
_BLOCK = 16 << 20

FileEntry = dict[str, int]


@dataclass(frozen=True)
class Published:
    """A checkpoint folder as its manifest describes it.

    Attributes:
        order: counts the checkpoints of a run as they are written; None when the manifest is missing or unreadable.
        weights_only: it holds no optimizer state, so a run cannot be resumed from it.
    """

    step: int
    order: int | None
    weights_only: bool


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def temporary_folder(root: Path, step: int) -> Path:
    """Where step `step` is written before it is published."""
    return step_folder(root, step).with_suffix(_TEMPORARY)


def published(root: Path) -> list[Published]:
    """Checkpoints in `root` in the order they were written, damaged ones included.

    Those without a readable manifest come last, so that whoever looks for the newest one meets them and says so.
    """
    if not root.is_dir():
        return []
    matches = (_STEP.match(path.name) for path in root.iterdir() if path.is_dir())
    found = [describe_folder(root, int(match.group(1))) for match in matches if match]
    return sorted(found, key=lambda entry: (entry.order is None, entry.order or 0, entry.step))


def describe_folder(root: Path, step: int) -> Published:
    try:
        manifest = read_manifest(step_folder(root, step))
        return Published(step, int(manifest["order"]), bool(manifest["weights_only"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Published(step, None, False)


def steps_in(root: Path) -> list[int]:
    """Steps of the published checkpoints in `root`, ascending, damaged ones included."""
    return sorted(entry.step for entry in published(root))


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def tidy(root: Path) -> None:
    """Put right what a process left that was killed while it published; no other process may be writing."""
    for aside in root.glob(f"step-*{_REPLACED}"):
        target = aside.with_suffix("")
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)


def begin(root: Path, step: int) -> Path:
    """An empty folder to write step `step` into; unfinished ones of earlier processes are removed."""
    tidy(root)
    for unfinished in root.glob(f"step-*{_TEMPORARY}"):
        shutil.rmtree(unfinished, ignore_errors=True)
    folder = temporary_folder(root, step)
    folder.mkdir(parents=True)
    return folder


def free_space(folder: Path) -> str:
    """A sentence about the disk that holds `folder`, for messages about writing there."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3f} GB are free there."
    except OSError:
        return ""


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and checksum of files, which are flushed to storage."""
    entries = {}
    for name in names:
        path = folder / name
        flush(path)
        entries[name] = {"size": path.stat().st_size, "crc32": checksum(path)}
    return entries


def files_of_rank(folder: Path, rank: int) -> list[str]:
    """Files that torch's writer made for `rank`."""
    return sorted(path.name for path in folder.glob(f"__{rank}_*"))


def files_in(folder: Path) -> list[str]:
    """All files below a checkpoint folder, without the manifest."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def publish(root: Path, step: int, files: Mapping[str, FileEntry], weights_only: bool = False) -> None:
    """Make the written folder the checkpoint of its step, in one rename.

    Args:
        files: entries known so far; those of other files in the folder are made here.
    """
    folder, target = temporary_folder(root, step), step_folder(root, step)
    entries = {**files, **describe_files(folder, [name for name in files_in(folder) if name not in files])}
    order = max((entry.order or 0 for entry in published(root)), default=0) + 1
    content = {"format": FORMAT_VERSION, "step": step, "order": order, "weights_only": weights_only, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))
    flush(folder / MANIFEST)
    flush(folder)
    aside = target.with_suffix(_REPLACED)
    if target.exists():  # the same step, saved again after going back; `tidy` undoes this if we die in between
        target.rename(aside)
    folder.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    flush(root)
    pointer = root / f"{LATEST}{_TEMPORARY}"
    pointer.write_text(f"{target.name}\n")
    flush(pointer)
    pointer.rename(root / LATEST)


def discard(root: Path, step: int) -> None:
    """Remove what a failed save left."""
    shutil.rmtree(temporary_folder(root, step), ignore_errors=True)


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def flush(path: Path) -> None:
    """Have the operating system write a file or folder to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a published checkpoint, or None when every file is as it was written.

    Args:
        rank, ranks: all sizes are compared, but checksums only of every `ranks`-th file from `rank` on, so that ranks
            can share the reading.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(folder)
        if manifest["format"] > FORMAT_VERSION:
            return f"format {manifest['format']} is newer than this flame reads ({FORMAT_VERSION})"
        for number, (name, entry) in enumerate(sorted(manifest["files"].items())):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if number % ranks == rank and checksum(path) != entry["crc32"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never completed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error!r})"
    return None


def require_step(root: Path, step: int) -> None:
    """Raise CheckpointError unless there is a folder for `step`."""
    if not step_folder(root, step).is_dir():
        have = ", ".join(str(number) for number in steps_in(root)) or "none"
        raise CheckpointError(
            f"there is no checkpoint {step_folder(root, step)}. Steps there: {have}. Set checkpoint.load_step to one."
        )


def purge(root: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints written last (0 keeps all).

    Folders without a readable manifest are no checkpoints of ours: they neither count nor go.
    """
    if keep > 0:
        for entry in [entry for entry in published(root) if entry.order is not None][:-keep]:
            shutil.rmtree(step_folder(root, entry.step), ignore_errors=True)
