"""Hugging Face datasets, prepared on disk (read at random) or streamed (read in order). Needs `datasets`.

Streams cannot be read at random. Their unit is one file (shard) of the dataset; with fewer files than virtual shards,
each file is dealt out row by row to several units, and each of these reads the whole file to keep its share. Shuffling
permutes files, then blocks of 1024 rows. Resuming inside a unit reads its file again up to the point where it stopped.
For local data prefer JSONL or Parquet by path, or `streaming = false`: both are read at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.data.permutation import combine, hash_text, mix64_array
from flame.data.settings import SourceSettings
from flame.data.sources.base import Document, IndexedSource, Malformed, Part, Source, shuffled_range
from flame.errors import DataError

BLOCK_ROWS = 1024


class PreparedDataset(IndexedSource):
    """A `datasets.Dataset`: memory-mapped Arrow, one document a row."""

    def __init__(self, name: str, dataset: Any, text_key: str) -> None:
        _check_column(name, dataset.column_names, text_key)
        self.name = name
        self._dataset = dataset.select_columns([text_key])
        self._text_key = text_key
        self.units = len(dataset)

    def document(self, index: int) -> Document:
        text = self._dataset[index][self._text_key]
        if not isinstance(text, str):
            return Malformed(f"dataset {self.name}: row {index}: no text under key {self._text_key!r}")
        return text

    def keys(self) -> npt.NDArray[np.uint64]:
        return mix64_array(np.arange(len(self._dataset), dtype=np.uint64))


class StreamedDataset(Source):
    """A `datasets.IterableDataset`, cut into units by file and, where there are few files, by row number."""

    def __init__(self, name: str, dataset: Any, text_key: str, shards: int) -> None:
        if dataset.column_names is not None:
            _check_column(name, dataset.column_names, text_key)
        self.name = name
        self._dataset = dataset
        self._text_key = text_key
        self._files = int(dataset.num_shards)
        self._slices = -(-shards // self._files)
        self.units = self._files * self._slices

    def read(self, unit: int, start: int, shuffle_key: int | None) -> Iterator[Document]:
        block = start // BLOCK_ROWS
        rows = self._rows(unit, block * BLOCK_ROWS)
        offset = start - block * BLOCK_ROWS
        while buffer := list(itertools.islice(rows, BLOCK_ROWS)):
            key = None if shuffle_key is None else combine(shuffle_key, block)
            yield from (buffer[index] for index in shuffled_range(len(buffer), offset, key))
            block, offset = block + 1, 0

    def _rows(self, unit: int, skip: int) -> Iterator[Document]:
        """The unit's documents in stored order, without its first `skip` ones."""
        file, share = divmod(unit, self._slices)
        stream = self._dataset.shard(num_shards=self._files, index=file) if self._files > 1 else self._dataset
        first = skip * self._slices + share
        for count, row in enumerate(itertools.islice(stream.skip(first), 0, None, self._slices)):
            text = row.get(self._text_key)
            if not self.part.whole and self.key(unit, skip + count) not in self.part:
                yield ""
            elif isinstance(text, str):
                yield text
            else:
                place = f"file {file}, row {first + count * self._slices}"
                yield Malformed(f"dataset {self.name}: {place}: no text under key {self._text_key!r}")

    def key(self, unit: int, index: int) -> int:
        file, share = divmod(unit, self._slices)
        return combine(hash_text(f"file {file}"), index * self._slices + share)

    def restrict(self, part: Part) -> Source:
        self.part = part
        return self


def open_dataset(name: str, settings: SourceSettings, shards: int) -> Source:
    """A dataset by its name on the hub or by local folder.

    Raises:
        DataError: `datasets` is not installed, or it could not load the dataset.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data source {settings.path!r} is not a local file or folder, and reading it as a Hugging Face dataset "
            "needs the package `datasets` (pip install datasets)."
        ) from error
    try:
        dataset = _load(datasets, settings)
    except Exception as error:
        raise DataError(
            f"data source {settings.path!r} could not be loaded as a Hugging Face dataset, and no such file or folder "
            f"exists here: {type(error).__name__}: {error}"
        ) from error
    if isinstance(dataset, dict):
        raise DataError(f"data source {settings.path!r} has splits {', '.join(dataset)}; set split to one of them.")
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedDataset(name, dataset, settings.text_key, shards)
    return PreparedDataset(name, dataset, settings.text_key)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _load(datasets: Any, settings: SourceSettings) -> Any:
    place = Path(settings.path).expanduser()
    if is_saved_dataset(place):
        saved = datasets.load_from_disk(str(place))
        if isinstance(saved, dict) and settings.split in saved:
            return saved[settings.split]
        return saved
    files = settings.data_files
    return datasets.load_dataset(
        str(place) if place.exists() else settings.path,
        name=settings.subset,
        split=settings.split,
        data_dir=settings.data_dir,
        data_files=list(files) if files is not None and not isinstance(files, str) else files,
        streaming=settings.streaming,
    )


def _check_column(name: str, columns: list[str], text_key: str) -> None:
    if text_key not in columns:
        raise DataError(f"dataset {name} has no column {text_key!r}; it has {', '.join(columns)}. Set text_key.")
