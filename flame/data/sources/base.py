"""What every data source is: a list of units, each a short stream of documents that can be read from any point.

A unit is the smallest thing that is dealt to a virtual shard. It is one document where documents can be read at random
(text, JSONL, pre-tokenized files, prepared Hugging Face datasets) and a run of neighbouring rows where that would mean
decompressing a whole block for each (Parquet, Hugging Face streams).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flame.data.permutation import Permutation, mix64, mix64_array
from flame.errors import DataError

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Malformed:
    """A document that could not be read: what is wrong and where. The reader decides whether that is an error."""

    reason: str


Document = str | Tokens | Malformed
"""A text, the ids of a document tokenized earlier, or the reason why there is none."""


@dataclass(frozen=True)
class Part:
    """The training or the held-out part of a source: documents whose key hashes below `holdout` are held out."""

    holdout: float = 0.0
    held_out: bool = False

    def __contains__(self, key: int) -> bool:
        return (mix64(key) < self.threshold) == self.held_out

    @property
    def threshold(self) -> int:
        """Keys hash below this when they are held out."""
        return int(self.holdout * 2.0**64)

    @property
    def whole(self) -> bool:
        """Whether this is all of the source."""
        return self.holdout == 0.0 and not self.held_out


class Source(ABC):
    """A named, finite list of units. Sources hold no open files until they are read, so that workers can inherit them.

    Attributes:
        name: label in metrics and checkpoints.
        units: number of units.
        tokenized: whether documents are ids rather than text.
        part: which documents are read.
    """

    name: str
    units: int
    tokenized: bool = False
    part: Part = Part()

    @abstractmethod
    def read(self, unit: int, start: int, shuffle_key: int | None) -> Iterator[Document]:
        """The documents of a unit from the `start`-th on, in an order decided by `shuffle_key` (None: as stored)."""

    @abstractmethod
    def key(self, unit: int, index: int) -> int:
        """A 64-bit name of the unit's `index`-th stored document that stays when documents are added to the source."""

    @abstractmethod
    def restrict(self, part: Part) -> Source:
        """The same source, reading only one part of its documents.

        Raises:
            DataError: that part is known to be empty.
        """


class IndexedSource(Source):
    """A source whose documents can each be read at random: one document a unit."""

    _selected: npt.NDArray[np.int64] | None = None
    _known_keys: npt.NDArray[np.uint64] | None = None

    @abstractmethod
    def document(self, index: int) -> Document:
        """Document `index` of the whole source."""

    @abstractmethod
    def keys(self) -> npt.NDArray[np.uint64]:
        """The key of every document of the whole source."""

    def read(self, unit: int, start: int, shuffle_key: int | None) -> Iterator[Document]:
        if start == 0:
            yield self.document(unit if self._selected is None else int(self._selected[unit]))

    def key(self, unit: int, index: int) -> int:
        if self._known_keys is None:
            self._known_keys = self.keys()
        return int(self._known_keys[unit if self._selected is None else self._selected[unit]])

    def restrict(self, part: Part) -> Source:
        if part.whole:
            return self
        held_out = mix64_array(self.keys()) < np.uint64(min(part.threshold, 2**64 - 1))
        self._selected = np.flatnonzero(held_out == part.held_out)
        self.units = len(self._selected)
        self.part = part
        if self.units == 0:
            kind = "held-out" if part.held_out else "training"
            raise DataError(
                f"data source {self.name!r} has {len(held_out)} documents, and none falls into its {kind} part at a "
                f"held-out share of {part.holdout}; change validation.holdout, or name data of its own in validation.dataset."
            )
        return self


def shuffled_range(count: int, start: int, shuffle_key: int | None) -> Iterator[int]:
    """Indices [0, count) in the order of a key, from the `start`-th on."""
    if shuffle_key is None:
        return iter(range(start, count))
    order = Permutation(count, shuffle_key)
    return (order(index) for index in range(start, count))
