"""Streaming data: sources, tokenizing, token-weighted mixtures, packing, virtual shards, loader."""

from flame.data.batch import Batch, Parts
from flame.data.build import build_loader, build_validation_loader, load_tokenizer, open_recipe
from flame.data.loader import Loader
from flame.data.settings import DataSettings, PackingSettings, RankSettings, SourceSettings, WorkerSettings
from flame.data.tokenizer import Tokenizer
from flame.data.validation import ValidationLoader

__all__ = [
    "Batch",
    "DataSettings",
    "Loader",
    "PackingSettings",
    "Parts",
    "RankSettings",
    "SourceSettings",
    "Tokenizer",
    "ValidationLoader",
    "WorkerSettings",
    "build_loader",
    "build_validation_loader",
    "load_tokenizer",
    "open_recipe",
]
