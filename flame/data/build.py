"""From settings to loaders."""

from __future__ import annotations

from flame.data.settings import DataSettings
from flame.data.shard import Recipe
from flame.data.sources import open_sources
from flame.data.sources.base import Part
from flame.data.tokenizer import Tokenizer


def open_recipe(settings: DataSettings, tokenizer: Tokenizer, *, held_out: bool = False) -> Recipe:
    """Open the sources: their training part, or their held-out part.

    Raises:
        DataError: a source is missing, empty or malformed, or the tokenizer lacks a token that packing needs.
    """
    if settings.packing.add_bos:
        tokenizer.require_bos()
    if settings.packing.add_eos:
        tokenizer.require_eos()
    part = Part(settings.holdout, held_out)
    sources = open_sources(settings.sources, settings.virtual_shards, part, tokenizer.fingerprint)
    return Recipe(settings, tuple(sources), tokenizer)
