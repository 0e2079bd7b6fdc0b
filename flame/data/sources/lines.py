"""Files whose documents are lines: JSONL and plain text by line, read at random through an index of line offsets."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from flame.data.permutation import hash_text, mix64_array
from flame.data.sources.base import Document, IndexedSource, Malformed
from flame.data.sources.paths import cached_path, line_offsets, make_once, relative_names
from flame.errors import DataError

_OPEN_FILES = 32


class LineFiles(IndexedSource):
    """One document a line.

    Args:
        name: label of the source.
        files: the files, in order; `.gz` and `.zst` files are unpacked once into the cache folder.
        text_key: JSON field that holds the text; None for plain text lines.
    """

    def __init__(self, name: str, files: Sequence[Path], text_key: str | None) -> None:
        self.name = name
        self._shown = list(files)
        self._files = [_unpacked(file) for file in files]
        self._text_key = text_key
        self._offsets = [line_offsets(file) for file in self._files]
        self._first = np.concatenate([[0], np.cumsum([len(offsets) - 1 for offsets in self._offsets])])
        self._file_keys = np.array([hash_text(entry) for entry in relative_names(files)], dtype=np.uint64)
        self.units = int(self._first[-1])
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}

    def document(self, index: int) -> Document:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        line = index - int(self._first[number])
        start, end = self._offsets[number][line : line + 2]
        data = self._map(number)[start:end].tobytes().rstrip(b"\r\n")
        if not data.strip():
            return ""
        try:
            text = data.decode("utf-8") if self._text_key is None else _text_of(json.loads(data), self._text_key)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            kind = "text line" if self._text_key is None else "JSON line"
            return Malformed(f"{self._shown[number]}:{line + 1}: not a {kind} ({error})")
        if text is None:
            return Malformed(f"{self._shown[number]}:{line + 1}: no text under key {self._text_key!r}")
        return text

    def keys(self) -> npt.NDArray[np.uint64]:
        lines = np.diff(self._first)
        numbers = np.arange(self.units) - np.repeat(self._first[:-1], lines)
        return mix64_array(np.repeat(self._file_keys, lines) + numbers.astype(np.uint64))

    def _map(self, number: int) -> npt.NDArray[np.uint8]:
        """The bytes of a file, memory-mapped; the least recently opened one is dropped when there are many."""
        if number not in self._maps:
            while len(self._maps) >= _OPEN_FILES:
                self._maps.pop(next(iter(self._maps)))
            self._maps[number] = np.memmap(self._files[number], dtype=np.uint8, mode="r")
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a pickled memory map would be a copy of the file


def _text_of(record: object, key: str) -> str | None:
    text = record.get(key) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _unpacked(file: Path) -> Path:
    """The file itself, or its unpacked copy in the cache folder."""
    if file.suffix not in (".gz", ".zst"):
        return file

    def unpack(temporary: Path) -> None:
        with _open_packed(file) as packed, open(temporary, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)

    try:
        return make_once(cached_path(file, ".jsonl"), unpack)
    except OSError as error:
        raise DataError(f"{file} could not be unpacked into the cache folder ($FLAME_CACHE): {error}") from error


def _open_packed(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{file}: reading .zst files needs pyarrow (pip install pyarrow).") from error
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
