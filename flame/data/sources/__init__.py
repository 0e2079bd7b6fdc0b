"""Data sources by path or name."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from flame.data.settings import SourceSettings
from flame.data.sources.base import Document, IndexedSource, Malformed, Part, Source
from flame.data.sources.huggingface import is_saved_dataset, open_dataset
from flame.data.sources.lines import LineFiles
from flame.data.sources.parquet import ParquetFiles
from flame.data.sources.paths import find_files, guess_kind
from flame.data.sources.pretokenized import Pretokenized, read_metadata
from flame.data.sources.text import open_standard_library, open_text_files
from flame.errors import DataError

__all__ = ["Document", "IndexedSource", "Malformed", "Part", "Source", "open_source", "open_sources"]

STDLIB = "stdlib"

# Builder names of `datasets` that users of other trainers write together with data_files.
_BUILDERS = {"json": "jsonl", "text": "text", "parquet": "parquet"}


def open_sources(settings: tuple[SourceSettings, ...], shards: int, part: Part, fingerprint: str) -> list[Source]:
    """All sources of a mixture, each restricted to `part`.

    Args:
        settings: the sources.
        shards: number of virtual shards that they will be dealt to.
        part: training or held-out part.
        fingerprint: the tokenizer's, which pre-tokenized sources must match.
    """
    names = source_names(settings)
    return [open_source(entry, name, shards, fingerprint).restrict(part) for entry, name in zip(settings, names)]


def open_source(settings: SourceSettings, name: str, shards: int, fingerprint: str | None = None) -> Source:
    """One source.

    Raises:
        DataError: it is missing, empty or of an unknown kind.
    """
    source = _open(settings, name, shards, fingerprint)
    if source.units == 0:
        raise DataError(f"data source {settings.path!r} is empty: it holds no document.")
    return source


def _open(settings: SourceSettings, name: str, shards: int, fingerprint: str | None) -> Source:
    kind = _kind(settings)
    if kind == "stdlib":
        return open_standard_library(name)
    if kind == "pretokenized":
        return Pretokenized(name, Path(settings.path).expanduser(), fingerprint)
    if kind == "huggingface":
        return open_dataset(name, settings, shards)
    files = [file for path in _local_paths(settings) for file in find_files(path, kind)]
    if kind == "parquet":
        return ParquetFiles(name, files, settings.text_key, shards)
    if kind == "jsonl":
        return LineFiles(name, files, settings.text_key)
    if settings.lines or settings.path in _BUILDERS:
        return LineFiles(name, files, None)
    return open_text_files(name, files)


def source_names(settings: tuple[SourceSettings, ...]) -> list[str]:
    """A distinct label for every source: its own, or one made from its path and subset."""
    names: list[str] = []
    for entry in settings:
        base = entry.name or "-".join(filter(None, [Path(entry.path.rstrip("/*")).name or entry.path, entry.subset]))
        if entry.name and entry.name in names:
            raise DataError(f"two data sources are named {entry.name!r}; give each its own name.")
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _local_paths(settings: SourceSettings) -> list[str]:
    """Paths of local files: `path` itself, or `data_files` with `path` as their folder or builder name."""
    if settings.data_files is None:
        return [os.path.join(settings.path, settings.data_dir) if settings.data_dir else settings.path]
    files = [settings.data_files] if isinstance(settings.data_files, str) else list(settings.data_files)
    folder = Path(settings.path, settings.data_dir or "").expanduser()
    if settings.path in _BUILDERS or not folder.is_dir():
        return files
    return [str(folder / file) for file in files]


def _kind(settings: SourceSettings) -> str:
    """What a source is. Files are read by flame itself unless a subset, a split or a stream of a folder is asked for."""
    if settings.kind != "auto":
        return settings.kind
    if settings.path == STDLIB:
        return "stdlib"
    if settings.path in _BUILDERS and settings.data_files is not None and not settings.streaming:
        return _BUILDERS[settings.path]
    place = Path(settings.path).expanduser()
    if place.is_dir() and read_metadata(place) is not None:
        return "pretokenized"
    stream = settings.streaming and not (place.is_file() or glob.has_magic(settings.path))  # files need no preparing
    if stream or settings.subset or settings.split != "train" or is_saved_dataset(place):
        return "huggingface"
    kind = guess_kind(settings.path)
    if kind is not None:
        return kind
    if place.is_dir():
        raise DataError(f"folder {place} holds no .txt, .jsonl or .parquet file; set kind if its files end otherwise.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", settings.path):
        raise DataError(f"data source {settings.path!r}: no such file or folder.")
    return "huggingface"
