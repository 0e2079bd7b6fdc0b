"""From a path, glob or folder to an ordered list of files, and the cache of what is learnt about them."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flame.data.permutation import hash_text
from flame.errors import DataError

# In this order a folder's kind is told: one with Parquet files and a README.md holds Parquet.
SUFFIXES = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst"),
    "text": (".txt", ".text", ".md", ".py", ".rst"),
}
_JSON = (".json", ".json.gz", ".json.zst")  # read as JSONL when named, not looked for in folders


def find_files(path: str, kind: str) -> list[Path]:
    """Files named by a path, glob or folder, sorted; a folder is searched for files of the kind, subfolders included.

    Raises:
        DataError: nothing there.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    suffixes = SUFFIXES[kind]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        if not found:
            raise DataError(f"folder {place} holds no {kind} file (looked for names ending in {', '.join(suffixes)}).")
        return found
    if not glob.has_magic(path):
        raise DataError(f"data file {place} does not exist.")
    found = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"no file matches {path!r}.")
    return found


def guess_kind(path: str) -> str | None:
    """The kind of local file that a path, glob or folder stands for; None when it names no known kind."""
    if path.endswith(_JSON):
        return "jsonl"
    place = Path(path).expanduser()
    names = [path]
    if place.is_dir():
        names = [name for _, _, files in os.walk(place) for name in files]
    elif glob.has_magic(path):
        names += glob.glob(str(place), recursive=True)
    for kind, suffixes in SUFFIXES.items():
        if any(name.endswith(suffixes) for name in names):
            return kind
    return "text" if place.is_file() else None


def relative_names(files: Sequence[Path]) -> list[str]:
    """Names of the files below their common folder: the same wherever the data is mounted."""
    if len(files) == 1:
        return [files[0].name]
    common = os.path.commonpath([file.parent for file in files])
    return [os.path.relpath(file, common) for file in files]


def cache_folder() -> Path:
    """Where indices are kept between runs: $FLAME_CACHE, else ~/.cache/flame."""
    return Path(os.environ.get("FLAME_CACHE", "~/.cache/flame")).expanduser() / "index"


def cached_path(file: Path, suffix: str) -> Path:
    """Where something made from `file` is cached; another size or change time gives another place."""
    stat = file.stat()
    return cache_folder() / f"{hash_text(f'{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}'):016x}{suffix}"


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(temporary)` unless it exists. Processes of one machine wait for the first to finish."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(target.name + ".lock")):
        if not target.exists():
            temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            try:
                make(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    return target


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file; other processes that want it wait."""

    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def line_offsets(file: Path) -> npt.NDArray[np.int64]:
    """Byte offsets [lines + 1] of the lines of a file, the last one its end.

    One pass at about the speed of the disk. The result of a file over 16 MB is kept in the cache folder, and read back
    memory-mapped.
    """
    if file.stat().st_size < 16 << 20:
        return _scan_lines(file)

    def make(temporary: Path) -> None:
        with open(temporary, "wb") as handle:
            np.save(handle, _scan_lines(file))

    try:
        return np.load(make_once(cached_path(file, ".lines.npy"), make), mmap_mode="r")
    except OSError:  # no writable cache folder: scan again in each process
        return _scan_lines(file)


def _scan_lines(file: Path) -> npt.NDArray[np.int64]:
    parts = [np.zeros(1, dtype=np.int64)]
    position = 0
    with open(file, "rb") as handle:
        while block := handle.read(8 << 20):
            parts.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + (position + 1))
            position += len(block)
    offsets = np.concatenate(parts)
    return offsets if offsets[-1] == position else np.append(offsets, position)
