"""One virtual shard's way through one source: which documents, in which order, tokenized in batches.

The units of all shards interleave into one endless sequence: shard v of V takes its elements v, v + V, v + 2V, ...
Element g is unit `order(g mod U)` of epoch `g div U`, with U the number of units. So every epoch holds every unit once
whatever V is, and a shard's place is two integers: how many units it has finished and how many documents of the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flame.data.permutation import Permutation, combine, hash_text
from flame.data.sources.base import Document, Malformed, Source
from flame.data.tokenizer import TokenArray, Tokenizer
from flame.errors import DataError

# Documents are tokenized together until they hold about so many characters. The amount doubles from the first batch to
# the last bound, so that the first row comes soon and the later ones use the tokenizer well.
_FIRST_BATCH_CHARACTERS = 1024
_BATCH_CHARACTERS = 32_768


class Position(NamedTuple):
    """Units finished by this shard, and documents read of the next one."""

    unit: int
    document: int


class Taken(NamedTuple):
    """A document on its way into rows."""

    tokens: TokenArray
    start: Position
    after: Position
    skipped: int
    """Malformed documents that this shard has left out of this source so far."""


@dataclass(frozen=True)
class Order:
    """Where a shard stands among the others, and the key of the shuffle."""

    shard: int
    virtual_shards: int
    seed: int
    shuffle: bool
    epochs: int | None = None
    """How often the source is read; None for ever."""


@dataclass(frozen=True)
class Encoder:
    """Text to ids, with the bos and eos that packing asks for."""

    tokenizer: Tokenizer
    add_bos: bool
    add_eos: bool

    def __call__(self, documents: list[str | np.ndarray]) -> list[TokenArray]:
        """Ids of each document, int32; an empty document stays empty."""
        texts = [document for document in documents if isinstance(document, str)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        arrays = [next(encoded) if isinstance(document, str) else document for document in documents]
        bos = np.array([self.tokenizer.require_bos()] if self.add_bos else [], dtype=np.int32)
        eos = np.array([self.tokenizer.require_eos()] if self.add_eos else [], dtype=np.int32)
        return [np.concatenate((bos, ids, eos), dtype=np.int32) if len(ids) else ids for ids in arrays]


class Reader:
    """Documents of one source for one shard, without end.

    Args:
        source: what is read.
        order: the shard's place and the shuffle.
        encode: from documents to ids.
        on_malformed: `error` or `skip`.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        encode: Callable[[list[str | np.ndarray]], list[TokenArray]],
        on_malformed: str,
    ) -> None:
        self.source = source
        self._order = order
        self._encode = encode
        self._strict = on_malformed == "error"
        self._key = combine(order.seed, hash_text(source.name))
        self._permutation: tuple[int, Permutation] | None = None
        self.seek(Position(0, 0), 0)

    def seek(self, position: Position, skipped: int) -> None:
        """Continue from `position`, where `skipped` malformed documents had been left out."""
        self._position = position
        self._skipped = skipped
        self._unit: Iterator[Document] | None = None
        self._ready: deque[Taken] = deque()
        self._batch = _FIRST_BATCH_CHARACTERS

    def take(self) -> Taken | None:
        """The next document that has at least one token; None after the last epoch.

        Raises:
            DataError: a malformed document under the policy `error`, or no usable document in the whole source.
        """
        while not self._ready and not self._ended(self._position):
            self._fill()
        return self._ready.popleft() if self._ready else None

    def epoch(self, position: Position) -> float:
        """How often the source has been read at `position`: 1.0 after every unit has been read once."""
        return (self._order.shard + position.unit * self._order.virtual_shards) / self.source.units

    def _fill(self) -> None:
        """Read and tokenize some documents."""
        documents: list[str | np.ndarray] = []
        places: list[tuple[Position, Position, int]] = []
        size = 0
        while size < self._batch:
            usable = self._next_usable()
            if usable is None:
                break
            document, start, after = usable
            documents.append(document)
            places.append((start, after, self._skipped))
            size += len(document) if isinstance(document, str) else 4 * len(document)
        self._batch = min(2 * self._batch, _BATCH_CHARACTERS)
        for ids, place in zip(self._encode(documents), places):
            if len(ids):
                self._ready.append(Taken(ids, *place))

    def _ended(self, position: Position) -> bool:
        return self._order.epochs is not None and self.epoch(position) >= self._order.epochs

    def _next_usable(self) -> tuple[str | np.ndarray, Position, Position] | None:
        """The next document that is neither empty nor malformed, and the positions before and after it."""
        first = self._position.unit
        while not self._ended(self._position):
            if self._position.unit - first > 2 * self.source.units:
                self._require_usable()
                first = self._position.unit
            if self._unit is None:
                self._unit = self._open(self._position)
            document = next(self._unit, None)
            start = self._position
            if document is None:
                self._position = Position(start.unit + 1, 0)
                self._unit = None
                continue
            self._position = Position(start.unit, start.document + 1)
            if isinstance(document, Malformed):
                self._refuse(document)
            elif len(document):
                return document, start, self._position
        return None

    def _require_usable(self) -> None:
        """Search the whole source for one good document: a shard's own order may miss the few there are for long."""
        malformed = 0
        for unit in range(self.source.units):
            for document in self.source.read(unit, 0, None):
                if isinstance(document, Malformed):
                    malformed += 1
                elif len(document):
                    return
        raise DataError(
            f"data source {self.source.name!r} holds no usable document: all are empty, or malformed ({malformed} of them)."
        )

    def _refuse(self, document: Malformed) -> None:
        if self._strict:
            raise DataError(f"{document.reason}. Repair it, or set on_malformed = 'skip' to leave such documents out.")
        self._skipped += 1

    def _open(self, position: Position) -> Iterator[Document]:
        """The documents of the shard's `position.unit`-th unit, from `position.document` on."""
        element = self._order.shard + position.unit * self._order.virtual_shards
        epoch, index = divmod(element, self.source.units)
        if not self._order.shuffle:
            # One step further each epoch: a shard must not meet the same unit for ever where V is a multiple of U.
            return self.source.read((index + epoch) % self.source.units, position.document, None)
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.source.units, combine(self._key, epoch)))
        unit = self._permutation[1](index)
        return self.source.read(unit, position.document, combine(self._key, epoch, unit))
