"""`flame tokenize`: write a data source as token ids, which training then reads without tokenizing."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flame.data.settings import MALFORMED_POLICIES, SOURCE_KINDS, SourceSettings
from flame.data.sources import Malformed, Source, open_source, source_names
from flame.data.sources.pretokenized import FORMAT, METADATA, VERSION, token_dtype
from flame.data.tokenizer import Tokenizer
from flame.errors import DataError

_BATCH_DOCUMENTS = 128
_UNITS_PER_PART = 200_000


@dataclass(frozen=True)
class _Job:
    """What a worker process needs to write any part."""

    source: Source
    tokenizer: Tokenizer
    folder: Path
    strict: bool


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that name one data source."""
    parser.add_argument("--source", default="stdlib", help="'stdlib', a file, folder, glob or Hugging Face dataset")
    parser.add_argument(
        "--kind", default="auto", choices=SOURCE_KINDS, help="kind of source; by default told by its path"
    )
    parser.add_argument("--text-key", default="text", help="field or column that holds the text")
    parser.add_argument("--lines", action="store_true", help="text files: every line is a document")
    parser.add_argument("--subset", default=None, help="Hugging Face: configuration name")
    parser.add_argument("--split", default="train", help="Hugging Face: split")


def source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name."""
    settings = SourceSettings(
        args.source, kind=args.kind, text_key=args.text_key, lines=args.lines, subset=args.subset, split=args.split
    )
    return open_source(settings, source_names((settings,))[0], shards=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flame tokenize`."""
    add_source_arguments(parser)
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder, tokenizer.json or 'bytes'")
    parser.add_argument("--output", required=True, help="new folder for the ids; name it as a training source")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 for all processors")
    parser.add_argument("--on-malformed", default="error", choices=MALFORMED_POLICIES, help="documents without text")


def main(args: argparse.Namespace) -> int:
    """Run `flame tokenize`."""
    started = time.perf_counter()
    workers = args.workers or os.cpu_count() or 1
    metadata = tokenize(
        source_of(args), Tokenizer.load(args.tokenizer), Path(args.output), args.on_malformed == "error", workers
    )
    seconds = time.perf_counter() - started
    print(
        f"{args.output}: {metadata['tokens']:,} tokens of {metadata['documents']:,} documents "
        f"({metadata['skipped']} malformed) in {seconds:.1f} s, {metadata['tokens'] / seconds / 1e6:.2f} M tokens/s"
    )
    return 0


def tokenize(
    source: Source, tokenizer: Tokenizer, folder: Path, strict: bool = True, workers: int = 1
) -> dict[str, Any]:
    """Write the ids of a source to `folder` and return its metadata.

    The documents and their order do not depend on `workers`. The folder appears under its name only when it is complete.

    Raises:
        DataError: the folder exists, the source is tokenized already, or a document is malformed and `strict` is set.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already; name another output folder or remove it.")
    if source.tokenized:
        raise DataError(f"data source {source.name!r} is tokenized already.")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    job = _Job(source, tokenizer, temporary, strict)
    bounds = range(0, source.units, _part_size(source.units, workers))
    ranges = [(number, start, min(start + bounds.step, source.units)) for number, start in enumerate(bounds)]
    try:
        parts = _write_parts(job, ranges, workers)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "source": source.name,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size),
        **{name: sum(part[name] for part in parts) for name in ("documents", "tokens", "skipped")},
        "parts": parts,
    }
    (temporary / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder)
    return metadata


def _part_size(units: int, workers: int) -> int:
    """Units of a part: several parts a worker, and none so large that a worker's memory fills."""
    return max(1, min(_UNITS_PER_PART, -(-units // (4 * workers)))) if workers > 1 else min(_UNITS_PER_PART, units)


def _write_parts(job: _Job, ranges: list[tuple[int, int, int]], workers: int) -> list[dict[str, int]]:
    if workers == 1:
        return [_write_part(job, *entry) for entry in ranges]
    with multiprocessing.get_context("spawn").Pool(min(workers, len(ranges)), _start, (job,)) as pool:
        return pool.map(_write_part_of_worker, ranges, chunksize=1)


_job_of_worker: _Job | None = None


def _start(job: _Job) -> None:
    global _job_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job_of_worker = job


def _write_part_of_worker(entry: tuple[int, int, int]) -> dict[str, int]:
    if _job_of_worker is None:
        raise RuntimeError("the worker has no job")
    return _write_part(_job_of_worker, *entry)


def _write_part(job: _Job, number: int, first: int, last: int) -> dict[str, int]:
    """Write units [first, last) as part `number`."""
    dtype = token_dtype(job.tokenizer.vocab_size)
    lengths: list[int] = []
    keys: list[int] = []
    skipped = 0
    documents = _documents(job, first, last)
    with open(job.folder / f"tokens-{number:05d}.bin", "wb") as file:
        while batch := list(islice(documents, _BATCH_DOCUMENTS)):
            skipped += sum(malformed for _, _, malformed in batch)
            keys += [key for key, _, _ in batch]
            for ids in job.tokenizer.encode_batch([text for _, text, _ in batch]):
                lengths.append(len(ids))
                file.write(ids.astype(dtype).tobytes())
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    np.save(job.folder / f"offsets-{number:05d}.npy", offsets)
    np.save(job.folder / f"keys-{number:05d}.npy", np.array(keys, dtype=np.uint64))
    return {"documents": len(lengths), "tokens": int(offsets[-1]), "skipped": skipped}


def _documents(job: _Job, first: int, last: int) -> Iterator[tuple[int, str, bool]]:
    """(key, text, whether it was malformed) of every document; a malformed one has no text."""
    for unit in range(first, last):
        for index, document in enumerate(job.source.read(unit, 0, None)):
            key = job.source.key(unit, index)
            if isinstance(document, str):
                yield key, document, False
                continue
            if isinstance(document, Malformed) and job.strict:
                raise DataError(
                    f"{document.reason}. Repair it, or pass --on-malformed skip to leave such documents out."
                )
            yield key, "", True
