"""Plain text: files as documents, lines as documents, and the Python standard library's own source."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flame.data.permutation import hash_text, mix64_array
from flame.data.sources.base import Document, IndexedSource, Malformed
from flame.data.sources.paths import relative_names
from flame.errors import DataError

PIECE_BYTES = 1 << 20
"""A larger text file is read as several documents, cut at line ends about this far apart."""

_SEARCH_BYTES = 1 << 16
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class TextFiles(IndexedSource):
    """One document a file; a file over 1 MiB is cut at line ends into pieces of about that size.

    Args:
        name: label of the source.
        files: the files, in order.
        names: what each file is called in the hash that decides the held-out part (relative paths).
    """

    def __init__(self, name: str, files: Sequence[Path], names: Sequence[str]) -> None:
        self.name = name
        self._files = list(files)
        sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
        pieces = np.maximum(1, -(-sizes // PIECE_BYTES))
        self._first = np.concatenate([[0], np.cumsum(pieces)])
        self._file_keys = np.array([hash_text(name) for name in names], dtype=np.uint64)
        self.units = int(self._first[-1])

    def document(self, index: int) -> Document:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        file, piece = self._files[number], index - int(self._first[number])
        single = self._first[number + 1] - self._first[number] == 1
        try:
            data = file.read_bytes() if single else _read_piece(file, piece)
        except OSError as error:
            return Malformed(f"{file}: cannot be read ({error})")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            return Malformed(f"{file}: not utf-8 text ({error.reason} at byte {error.start + piece * PIECE_BYTES})")

    def keys(self) -> npt.NDArray[np.uint64]:
        pieces = np.diff(self._first)
        numbers = np.arange(self.units) - np.repeat(self._first[:-1], pieces)
        return mix64_array(np.repeat(self._file_keys, pieces) + numbers.astype(np.uint64))


def _read_piece(file: Path, piece: int) -> bytes:
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start, end = (_boundary(handle.fileno(), min(at * PIECE_BYTES, size)) for at in (piece, piece + 1))
        return os.pread(handle.fileno(), end - start, start)


def _boundary(descriptor: int, offset: int) -> int:
    """First line start at or after `offset`; without one nearby, the first start of a utf-8 character."""
    if offset == 0:
        return 0
    window = os.pread(descriptor, _SEARCH_BYTES, offset - 1)
    newline = window.find(b"\n")
    if newline >= 0:
        return offset + newline
    skip = 1
    while skip < len(window) and window[skip] & 0xC0 == 0x80:
        skip += 1
    return offset - 1 + skip


def open_text_files(name: str, files: Sequence[Path]) -> TextFiles:
    """Text files as documents; the held-out part is decided by their paths below their common folder."""
    return TextFiles(name, files, relative_names(files))


def standard_library_files() -> tuple[Path, list[Path]]:
    """The Python standard library's folder and its .py files, in order of relative path.

    Left out: tests (a third of them is generated tables), installed packages, and the few files that are empty or not
    utf-8. About 12 MB for Python 3.11.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [entry for entry in folders if entry not in _NOT_LIBRARY]
        found += [Path(folder, entry) for entry in names if entry.endswith(".py")]
    found = sorted((file for file in found if _is_text(file)), key=lambda file: file.relative_to(root).as_posix())
    if not found:
        raise DataError(
            f"this Python has no library source at {root}, so the built-in source 'stdlib' is empty; name text "
            "files instead."
        )
    return root, found


def open_standard_library(name: str) -> TextFiles:
    """The built-in source `stdlib`."""
    root, files = standard_library_files()
    return TextFiles(name, files, [file.relative_to(root).as_posix() for file in files])


def _is_text(file: Path) -> bool:
    try:
        return bool(file.read_text(encoding="utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False
