"""Checkpoint folders on disk: complete or absent.

A checkpoint is written to ``step-N.tmp``, described by a manifest (size and CRC-32 of every file, written last), flushed,
renamed to ``step-N``, and only then named by ``latest``. A folder without a manifest, or one whose files do not match it,
is not a checkpoint: it is passed over, by name, and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

from flame.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT_VERSION = 1
_STEP = re.compile(r"step-(\d+)$")
_BLOCK = 16 << 20


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def steps_in(root: Path) -> list[int]:
    """Steps of the published checkpoints in `root`, ascending, damaged ones included."""
    if not root.is_dir():
        return []
    matches = (_STEP.match(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def begin(root: Path, step: int) -> Path:
    """An empty folder to write step `step` into."""
    folder = step_folder(root, step).with_suffix(".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(root: Path, step: int, folder: Path) -> None:
    """Make a written folder the checkpoint of its step, in one rename."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"size": path.stat().st_size, "crc32": checksum(path)} for path in files}
    for path in files:
        flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT_VERSION, "step": step, "files": entries}, indent=1))
    flush(manifest)
    target = step_folder(root, step)
    shutil.rmtree(target, ignore_errors=True)  # the same step, saved again after a rollback
    folder.rename(target)
    flush(root)
    pointer = root / f"{LATEST}.tmp"
    pointer.write_text(f"{target.name}\n")
    flush(pointer)
    pointer.rename(root / LATEST)


def discard(folder: Path) -> None:
    """Remove what a failed save left."""
    shutil.rmtree(folder, ignore_errors=True)


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


def damage(folder: Path) -> str | None:
    """What is wrong with a published checkpoint, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] > FORMAT_VERSION:
            return f"format {manifest['format']} is newer than this flame reads ({FORMAT_VERSION})"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if checksum(path) != entry["crc32"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never completed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def newest_good(root: Path) -> int | None:
    """The newest step whose checkpoint is undamaged; damaged ones are named in the log and passed over."""
    for step in reversed(steps_in(root)):
        problem = damage(step_folder(root, step))
        if problem is None:
            return step
        logger.warning("Checkpoint %s is damaged: %s. Trying the one before it.", step_folder(root, step), problem)
    return None


def require_good(root: Path, step: int) -> None:
    """Raise CheckpointError unless `step` can be loaded."""
    folder = step_folder(root, step)
    if not folder.is_dir():
        have = ", ".join(str(number) for number in steps_in(root)) or "none"
        raise CheckpointError(f"there is no checkpoint {folder}. Steps there: {have}. Set checkpoint.load_step to one.")
    problem = damage(folder)
    if problem is not None:
        raise CheckpointError(f"checkpoint {folder} is damaged: {problem}. Set checkpoint.load_step to another step.")


def purge(root: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond the newest `keep` (0 keeps all), never the newest one."""
    if keep > 0:
        for step in steps_in(root)[:-keep]:
            shutil.rmtree(step_folder(root, step), ignore_errors=True)
