"""Files of token ids written by `flame tokenize`, memory-mapped.

A folder holds `metadata.json` and numbered parts: `tokens-00000.bin` (raw little-endian ids of all documents, one after
another, without bos and eos), `offsets-00000.npy` (int64 [documents + 1]) and `keys-00000.npy` (uint64 [documents], the
key of each document in the source it came from, so that the held-out part is the same as when tokenizing online).
Documents that were malformed are kept as empty ones, so that the order is the same too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.data.sources.base import Document, IndexedSource, Tokens
from flame.errors import DataError

FORMAT = "flame-tokens"
VERSION = 1
METADATA = "metadata.json"


def token_dtype(vocab_size: int) -> str:
    """Smallest dtype that holds every id: little-endian uint16 up to 65536 ids, else uint32."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """The metadata of a pre-tokenized folder; None when `folder` is not one."""
    file = folder / METADATA
    if not file.is_file():
        return None
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    return metadata if isinstance(metadata, dict) and metadata.get("format") == FORMAT else None


class Pretokenized(IndexedSource):
    """Documents as ids.

    Raises:
        DataError: not such a folder, of a newer version, incomplete, or written with another tokenizer.
    """

    tokenized = True

    def __init__(self, name: str, folder: Path, fingerprint: str | None) -> None:
        metadata = read_metadata(folder)
        if metadata is None:
            raise DataError(f"{folder} is no folder written by `flame tokenize` (no {METADATA} of that format).")
        if metadata["version"] != VERSION:
            raise DataError(f"{folder} has format version {metadata['version']}, this flame reads {VERSION}.")
        if fingerprint is not None and metadata["tokenizer"] != fingerprint:
            raise DataError(
                f"{folder} was tokenized with tokenizer {metadata['tokenizer']}, the job's tokenizer is {fingerprint}; "
                "name that tokenizer in model.tokenizer_path or run `flame tokenize` again."
            )
        self.name = name
        self._folder = folder
        self._dtype = np.dtype(metadata["dtype"])
        counts = [part["documents"] for part in metadata["parts"]]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._offsets = [np.load(folder / f"offsets-{part:05d}.npy", mmap_mode="r") for part in range(len(counts))]
        self.units = int(self._first[-1])
        self._maps: dict[int, Tokens] = {}
        for number, part in enumerate(metadata["parts"]):
            _check_size(folder / f"tokens-{number:05d}.bin", part["tokens"] * self._dtype.itemsize)

    def document(self, index: int) -> Document:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        start, end = self._offsets[number][index - int(self._first[number]) :][:2]
        if start == end:
            return np.zeros(0, dtype=np.int32)
        if number not in self._maps:
            self._maps[number] = np.memmap(self._folder / f"tokens-{number:05d}.bin", dtype=self._dtype, mode="r")
        return self._maps[number][start:end]

    def keys(self) -> npt.NDArray[np.uint64]:
        return np.concatenate([np.load(self._folder / f"keys-{part:05d}.npy") for part in range(len(self._offsets))])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _check_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else 0
    if found != expected:
        raise DataError(f"{file} has {found} bytes, expected {expected}; it is incomplete: run `flame tokenize` again.")
