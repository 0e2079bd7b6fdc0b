"""Small corpora whose every document can be recognised in the rows, and helpers that read loaders."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

from flame.data import (
    Batch,
    DataSettings,
    Loader,
    PackingSettings,
    RankSettings,
    SourceSettings,
    Tokenizer,
    WorkerSettings,
    open_recipe,
)
from flame.data.permutation import mix64

SHARDS = 12


def texts(label: str, count: int) -> list[str]:
    """Texts of very different lengths, none a multiple of anything."""
    return [
        f"{label}{index}:" + "".join(f"{label}{step}," for step in range(mix64(index) % 37)) for index in range(count)
    ]


def write_jsonl(file: Path, documents: list[str], key: str = "text") -> Path:
    file.write_text("".join(json.dumps({key: document}) + "\n" for document in documents), encoding="utf-8")
    return file


def mixture(folder: Path) -> tuple[SourceSettings, ...]:
    """Two JSONL sources of 23 and 40 documents, mixed 3 : 1."""
    first = write_jsonl(folder / "a.jsonl", texts("a", 23))
    second = write_jsonl(folder / "b.jsonl", texts("b", 40))
    return (SourceSettings(str(first), weight=3), SourceSettings(str(second), weight=1))


def recipe_of(sources, *, seq_len=32, varlen=False, context_len=None, **settings):
    packing = PackingSettings(seq_len, varlen, context_len)
    settings = {"virtual_shards": SHARDS, **settings}
    return open_recipe(DataSettings(tuple(sources), packing, **settings), Tokenizer.byte_level())


def loader_of(recipe, rank=0, world=1, workers=0, batch=1) -> Loader:
    return Loader(recipe, RankSettings(rank, world, batch, WorkerSettings(num_workers=workers)))


def rows_of(batch: Batch, seq_len: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(number, inputs, labels) of each row of a batch."""
    inputs, labels = batch.input_ids.reshape(-1, seq_len), batch.labels.reshape(-1, seq_len)
    return [
        (number, tuple(row.tolist()), tuple(label.tolist()))
        for number, row, label in zip(batch.row_numbers, inputs, labels)
    ]


def take(loader: Loader, batches: int) -> list[Batch]:
    return list(islice(loader, batches))


class Run:
    """All ranks of a run, stepped together: `global_rows` rows a step."""

    def __init__(
        self, recipe, world: int, workers: int, batch: int, global_rows: int, state: dict | None = None
    ) -> None:
        self.loaders = [loader_of(recipe, rank, world, workers, batch) for rank in range(world)]
        self.seq_len = recipe.settings.packing.seq_len
        self.micro_steps = global_rows // (world * batch)
        if state is not None:
            for loader in self.loaders:
                loader.load_state_dict(json.loads(json.dumps(state)))

    def step(self) -> Counter:
        """The multiset of the rows of one step."""
        batches = [batch for loader in self.loaders for batch in take(loader, self.micro_steps)]
        return Counter(row for batch in batches for row in rows_of(batch, self.seq_len))

    def steps(self, count: int) -> list[Counter]:
        return [self.step() for _ in range(count)]

    def state(self) -> dict:
        merged: dict = {}
        for loader in self.loaders:
            merged.update(loader.state_dict())
        return merged

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()
