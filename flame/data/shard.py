"""A virtual shard: an endless, restartable sequence of rows made from a mixture of sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flame.data.permutation import combine, mix64
from flame.data.reader import Encoder, Order, Position, Reader, Taken
from flame.data.settings import DataSettings
from flame.data.sources.base import Source
from flame.data.state import STATE_VERSION, check_state
from flame.data.tokenizer import TokenArray, Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to make any shard: the opened sources, the tokenizer and the settings."""

    settings: DataSettings
    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    epochs: int | None = None
    """How often each source is read; None for ever."""


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        number: its place in the whole run; it comes from shard `number mod V`.
        tokens: int32 [T].
        labels: int32 [T], the token that follows each, or -100.
        starts: int32 [N], where pieces of documents begin (varlen only; the first is 0).
        source_tokens: int64 [S], tokens from each source.
        state: the shard's state after this row.
    """

    number: int
    tokens: TokenArray
    labels: TokenArray
    starts: TokenArray | None
    source_tokens: npt.NDArray[np.int64]
    state: dict[str, Any]


@dataclass
class _Open:
    """The document being cut into rows."""

    source: int
    document: Taken
    offset: int


class _Piece(NamedTuple):
    """Tokens of one document for one row, and the document's token after them (-100 at its end)."""

    tokens: TokenArray
    source: int
    following: int


class Shard:
    """Rows of one virtual shard.

    Sources are mixed by tokens: every document of n tokens gives each source a credit of n times its share and takes n
    from the source it came from; the source with the largest credit gives the next document. Credits stay within a
    document's length of each other, so the shares are exact in the long run, and new weights apply from the moment
    they are set. A rest of a document that did not fit into a row is known by its position and an offset, so the state
    has the same few hundred bytes wherever the shard stops; resuming tokenizes that one document again.
    """

    def __init__(self, recipe: Recipe, number: int) -> None:
        self.number = number
        self._recipe = recipe
        self._packing = recipe.settings.packing
        self._virtual_shards = recipe.settings.virtual_shards
        self._rows = 0
        weights = np.array([source.weight for source in recipe.settings.sources])
        self._shares = [float(share) for share in weights / weights.sum()]
        self._credits = [0.0] * len(self._shares)
        # Shards begin with different sources, in the proportion of the mixture.
        self._credits[_first_source(self._shares, _fraction(number))] = 1.0
        self._tokens = [0] * len(self._shares)
        self._open: _Open | None = None
        self._ended: set[int] = set()
        self._set_seed(recipe.settings.seed)

    def _set_seed(self, seed: int) -> None:
        settings, packing = self._recipe.settings, self._packing
        self._seed = seed
        order = Order(self.number, self._virtual_shards, seed, settings.shuffle, self._recipe.epochs)
        encode = Encoder(self._recipe.tokenizer, packing.add_bos, packing.add_eos)
        self._readers = [Reader(source, order, encode, settings.on_malformed) for source in self._recipe.sources]
        self._places = [(Position(0, 0), 0) for _ in self._readers]  # after the last document taken, and skipped

    @property
    def next_number(self) -> int:
        """Place in the whole run of the next row."""
        return self.number + self._rows * self._virtual_shards

    def next_row(self) -> Row | None:
        """Make the next row; None at the end of data that is read once, whose last row is padded with label -100."""
        packing, length = self._packing, self._packing.seq_len
        tokens, labels = np.zeros(length, dtype=np.int32), np.full(length, IGNORED, dtype=np.int32)
        counts = np.zeros(len(self._readers), dtype=np.int64)
        starts, filled = [], 0
        while filled < length and (piece := self._cut(min(length - filled, packing.longest))) is not None:
            starts.append(filled)
            end = filled + len(piece.tokens)
            tokens[filled:end] = piece.tokens
            labels[filled : end - 1] = piece.tokens[1:]
            labels[end - 1] = piece.following
            counts[piece.source] += len(piece.tokens)
            filled = end
        if filled == 0:
            return None
        if not packing.varlen:
            labels[: filled - 1] = tokens[1:filled]
            labels[filled - 1] = self._peek()
            return self._finish(tokens, labels, None, counts)
        starts += range(filled, length, packing.longest)  # padding is cut like documents
        return self._finish(tokens, labels, np.array(starts, dtype=np.int32), counts)

    def _cut(self, limit: int) -> _Piece | None:
        """At most `limit` next tokens of one document."""
        current = self._current()
        if current is None:
            return None
        tokens, start = current.document.tokens, current.offset
        current.offset = end = min(start + limit, len(tokens))
        if end < len(tokens):
            return _Piece(tokens[start:end], current.source, int(tokens[end]))
        self._open = None
        return _Piece(tokens[start:end], current.source, IGNORED)

    def _peek(self) -> int:
        """The first token of the next row, which is the last label of this one."""
        current = self._current()
        return IGNORED if current is None else int(current.document.tokens[current.offset])

    def _current(self) -> _Open | None:
        """The document being cut, or the next one from the source that is furthest below its share."""
        while self._open is None:
            wanted = [index for index, share in enumerate(self._shares) if share > 0 and index not in self._ended]
            if not wanted:
                return None
            source = max(wanted, key=self._credits.__getitem__)
            document = self._readers[source].take()
            if document is None:
                self._ended.add(source)
                continue
            size = len(document.tokens)
            self._credits = [credit + share * size for credit, share in zip(self._credits, self._shares)]
            self._credits[source] -= size
            self._places[source] = (document.after, document.skipped)
            self._open = _Open(source, document, 0)
        return self._open

    def _finish(
        self, tokens: TokenArray, labels: TokenArray, starts: TokenArray | None, counts: npt.NDArray[np.int64]
    ) -> Row:
        number = self.next_number
        self._rows += 1
        self._tokens = [total + int(count) for total, count in zip(self._tokens, counts)]
        return Row(number, tokens, labels, starts, counts, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where the shard stands: numbers and short texts only, a few hundred bytes, ready for JSON."""
        sources = {}
        for index, reader in enumerate(self._readers):
            position, skipped = self._places[index]
            sources[reader.source.name] = {
                "unit": position.unit,
                "document": position.document,
                "skipped": skipped,
                "tokens": self._tokens[index],
                "credit": self._credits[index],
                "units": reader.source.units,
                "epoch": reader.epoch(position),
            }
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "shard": self.number,
            "virtual_shards": self._virtual_shards,
            "seed": self._seed,
            "rows": self._rows,
            "sources": sources,
            "open": None,
        }
        if self._open is not None:
            start = self._open.document.start
            name = self._readers[self._open.source].source.name
            state["open"] = {
                "source": name,
                "unit": start.unit,
                "document": start.document,
                "offset": self._open.offset,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, which may come from a mixture of other sources or weights.

        A source that is new starts at its beginning, one that is gone is forgotten. The shuffle goes on with the seed
        that it began with.
        """
        check_state(state, self.number, self._virtual_shards)
        if state["seed"] != self._seed:
            self._set_seed(state["seed"])
        self._rows = state["rows"]
        self._open = None
        self._tokens, self._credits = [0] * len(self._readers), [0.0] * len(self._readers)
        for index, reader in enumerate(self._readers):
            saved = state["sources"].get(reader.source.name)
            if saved is not None:
                self._places[index] = (Position(saved["unit"], saved["document"]), saved["skipped"])
                self._tokens[index], self._credits[index] = saved["tokens"], saved["credit"]
                reader.seek(*self._places[index])
        if state["open"] is not None:
            self._reopen(state)

    def _reopen(self, state: Mapping[str, Any]) -> None:
        """Read and tokenize again the document whose rest was left over."""
        rest = state["open"]
        names = [reader.source.name for reader in self._readers]
        if rest["source"] not in names:
            return
        index = names.index(rest["source"])
        reader, saved = self._readers[index], state["sources"][rest["source"]]
        if reader.source.units != saved["units"]:
            return
        reader.seek(Position(rest["unit"], rest["document"]), saved["skipped"])
        document = reader.take()
        if document is not None and rest["offset"] < len(document.tokens):
            self._open = _Open(index, document, rest["offset"])


def _first_source(shares: list[float], fraction: float) -> int:
    """The source at `fraction` of the way through the shares laid end to end."""
    total = 0.0
    for index, share in enumerate(shares):
        total += share
        if fraction < total:
            return index
    return int(np.argmax(shares))


def _fraction(number: int) -> float:
    """A fixed number in [0, 1) for every shard, evenly spread."""
    return mix64(combine(number)) / 2.0**64
