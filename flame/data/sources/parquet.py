"""Parquet files: a unit is a run of neighbouring rows of one row group, since single rows cannot be read at random.

Opening a unit decodes its row group up to the unit's end, a batch at a time, and keeps the unit's rows only. Row groups
of up to `MAX_ROWS` rows, the common case, are decoded once an epoch; larger ones are cut into several units and decoded
once for each. Small data is cut into small units, whose decoded row groups a worker keeps. Resuming inside a unit costs
one such opening.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flame.data.permutation import combine, hash_text
from flame.data.sources.base import Document, Malformed, Part, Source, shuffled_range
from flame.data.sources.paths import relative_names
from flame.errors import DataError

MAX_ROWS = 8192
_KEPT_BYTES = 128 << 20
UNITS_PER_SHARD = 16
"""Row groups are cut until there are about this many units a shard, so that epochs end at about the same time."""


class ParquetFiles(Source):
    """One document a row.

    Args:
        name: label of the source.
        files: the files, in order.
        text_key: the string column that holds the text.
        shards: number of virtual shards that the units will be dealt to.
    """

    def __init__(self, name: str, files: Sequence[Path], text_key: str, shards: int) -> None:
        self.name = name
        self._files = list(files)
        self._text_key = text_key
        self._file_keys = [hash_text(entry) for entry in relative_names(files)]
        groups = [group for number, file in enumerate(self._files) for group in self._row_groups(number, file)]
        rows = sum(group[3] for group in groups)
        limit = min(MAX_ROWS, max(1, rows // (UNITS_PER_SHARD * shards)))
        # [units, 5]: file, row group, first row in the row group, rows, first row in the file
        self._units = np.array([unit for group in groups for unit in _cut(group, limit)], dtype=np.int64).reshape(-1, 5)
        self.units = len(self._units)
        self._group_rows = {(number, group): rows for number, group, _, rows, _ in groups}
        self._kept: dict[tuple[int, int], Any] = {}

    def _row_groups(self, number: int, file: Path) -> list[tuple[int, int, int, int, int]]:
        parquet = _open(file)
        _check_column(file, parquet.schema_arrow, self._text_key)
        groups, first = [], 0
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            groups.append((number, group, 0, rows, first))
            first += rows
        parquet.close()
        return groups

    def read(self, unit: int, start: int, shuffle_key: int | None) -> Iterator[Document]:
        number, group, row, rows, first = (int(value) for value in self._units[unit])
        if start >= rows:
            return
        texts = self._column(number, group, row, rows)
        for index in shuffled_range(rows, start, shuffle_key):
            if not self.part.whole and self.key(unit, index) not in self.part:
                yield ""  # keeps the count of documents read equal to the position in the unit
                continue
            text = texts[index].as_py()
            where = f"{self._files[number]}: row {first + index + 1}"
            yield Malformed(f"{where}: no text in column {self._text_key!r}") if text is None else text

    def key(self, unit: int, index: int) -> int:
        number, _, _, _, first = (int(value) for value in self._units[unit])
        return combine(self._file_keys[number], first + index)

    def _column(self, number: int, group: int, row: int, rows: int) -> Any:
        """The text column of `rows` rows from `row` on, of one row group."""
        if self._group_rows[number, group] > MAX_ROWS:
            return _decode(self._files[number], group, self._text_key, row, rows)
        # A row group this small is cut into units only because there are few of them: read it once for all its units.
        column = self._kept.pop((number, group), None)
        if column is None:
            column = _decode(self._files[number], group, self._text_key, 0, self._group_rows[number, group])
        self._kept[number, group] = column
        while len(self._kept) > 1 and sum(entry.nbytes for entry in self._kept.values()) > _KEPT_BYTES:
            self._kept.pop(next(iter(self._kept)))
        return column.slice(row, rows)

    def restrict(self, part: Part) -> Source:
        self.part = part
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def _decode(file: Path, group: int, text_key: str, row: int, rows: int) -> Any:
    """`rows` rows from `row` on of a row group's column, decoded a batch at a time."""
    import pyarrow

    parquet = _open(file)
    found, seen = [], 0
    # Without threads: the calling process is one of several on the machine, and may have been forked.
    for batch in parquet.iter_batches(MAX_ROWS, row_groups=[group], columns=[text_key], use_threads=False):
        start, end = max(row - seen, 0), min(row + rows - seen, batch.num_rows)
        if start < end:
            found.append(batch.column(0).slice(start, end - start))
        seen += batch.num_rows
        if seen >= row + rows:
            break
    parquet.close()
    return pyarrow.chunked_array(found)


def _cut(group: tuple[int, int, int, int, int], limit: int) -> Iterator[tuple[int, int, int, int, int]]:
    number, index, _, rows, first = group
    pieces = max(1, -(-rows // limit))
    bounds = [rows * piece // pieces for piece in range(pieces + 1)]
    for start, end in zip(bounds, bounds[1:]):
        if end > start:
            yield number, index, start, end - start, first + start


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file}: reading Parquet needs pyarrow (pip install pyarrow).") from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {error}") from error


def _check_column(file: Path, schema: Any, text_key: str) -> None:
    import pyarrow.types

    if text_key not in schema.names:
        raise DataError(f"{file} has no column {text_key!r}; it has {', '.join(schema.names)}. Set text_key.")
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{file}: column {text_key!r} holds {kind}, expected text. Set text_key.")
