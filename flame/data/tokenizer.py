"""Tokenizers: loading, encoding many documents at once, training, and saving where transformers can read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flame.errors import DataError

BYTES = "bytes"
"""Name of the built-in tokenizer: 256 bytes and two special tokens, no file needed."""

RUN_FOLDER = "tokenizer"
"""Where a run keeps the tokenizer that it trained, below its folder."""

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"

# Looked for, in this order, when a tokenizer comes without a tokenizer_config.json.
_BOS_NAMES = (BOS_TOKEN, "<s>", "<bos>", "<|startoftext|>")
_EOS_NAMES = (EOS_TOKEN, "</s>", "<eos>", "<|endoftext|>", "<|im_end|>")
_HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

TokenArray = npt.NDArray[np.int32]


class Tokenizer:
    """A Hugging Face `tokenizers` tokenizer with its bos and eos tokens.

    Args:
        backend: the tokenizer proper.
        config: content of `tokenizer_config.json`; `bos_token`, `eos_token` and `pad_token` are read from it and all
            of it is written back by `save`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        self.backend = backend
        # A saved tokenizer may carry padding or truncation of whatever it was last used for. Data has neither.
        self.backend.no_padding()
        self.backend.no_truncation()
        self.config = dict(config or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """Number of ids, added tokens included: the largest id plus one, which is what an embedding must hold."""
        self.bos_id = _special_id(vocabulary, self.config.get("bos_token"), _BOS_NAMES, bool(config))
        self.eos_id = _special_id(vocabulary, self.config.get("eos_token"), _EOS_NAMES, bool(config))
        self.pad_id = _special_id(vocabulary, self.config.get("pad_token"), (), True)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From `bytes`, a folder that holds tokenizer.json, that file itself, or a Hugging Face model name.

        Raises:
            DataError: nothing there, or not a tokenizer.
        """
        if str(path) == BYTES:
            return cls.byte_level()
        place = Path(path).expanduser()
        if not place.exists():
            place = _download(str(path))
        file = place / "tokenizer.json" if place.is_dir() else place
        if not file.is_file():
            raise DataError(
                f"{place} holds no tokenizer.json. If it holds a tokenizer of another form, convert it with "
                f"transformers: AutoTokenizer.from_pretrained({str(place)!r}).save_pretrained(<folder>)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust binding raises bare Exception
            raise DataError(
                f"{file} is not a tokenizer ({error}). Name a folder or a tokenizer.json as the tokenizers library or "
                "`flame train-tokenizer` writes them, a Hugging Face repository, or 'bytes'."
            ) from error
        return cls(backend, _read_config(file.parent))

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """The built-in tokenizer: one id a byte (0-255), then bos (256) and eos (257)."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
        backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        _make_byte_level(backend)
        backend.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
        return cls(backend, {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` ids, bos (0) and eos (1) included. Deterministic."""
        if vocab_size < 258:
            raise DataError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least 258 (256 bytes, bos, eos).")
        backend = tokenizers.Tokenizer(models.BPE())
        _make_byte_level(backend)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[BOS_TOKEN, EOS_TOKEN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN})

    @property
    def fingerprint(self) -> str:
        """Short hash of everything that decides the ids of a text."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of one text; bos and eos only when asked for."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return ([self.require_bos()] if bos else []) + ids + ([self.require_eos()] if eos else [])

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of many texts, int32, without bos and eos. Faster than one at a time."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, dtype=np.int32) for item in encoded]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids` (any iterable of integers, tensors included)."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def require_bos(self) -> int:
        """The bos id, or a DataError when the tokenizer has none."""
        if self.bos_id is None:
            raise DataError(
                "the tokenizer has no bos token; set training.add_bos = false, or name a bos_token in its "
                "tokenizer_config.json."
            )
        return self.bos_id

    def require_eos(self) -> int:
        """The eos id, or a DataError when the tokenizer has none."""
        if self.eos_id is None:
            raise DataError(
                "the tokenizer has no eos token; set training.add_eos = false, or name a eos_token in its "
                "tokenizer_config.json."
            )
        return self.eos_id

    def check_fits(self, model_vocab_size: int) -> None:
        """Refuse a tokenizer whose ids the model's embedding cannot hold."""
        if self.vocab_size > model_vocab_size:
            raise DataError(
                f"the tokenizer has {self.vocab_size} ids but the model's vocab_size is {model_vocab_size}; "
                f"set model.vocab_size to at least {self.vocab_size} (a multiple of 64 is fastest)."
            )

    def save(self, folder: str | Path) -> None:
        """Write `files` into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """Texts of tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
        special = {f"{kind}_token": self._token(getattr(self, f"{kind}_id")) for kind in ("bos", "eos", "pad")}
        special = {name: token for name, token in special.items() if token is not None}
        named = "tokenizer_class" in self.config
        made = {} if named else {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config = {**made, **special, **self.config}
        return {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": _json(config),
            "special_tokens_map.json": _json(special),
        }

    def _token(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.backend.id_to_token(token_id)

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self.backend.to_str(), "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state["backend"]), state["config"])  # type: ignore[misc]


def _make_byte_level(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _byte_of(char: str) -> int:
    """The byte that a character of the byte-level alphabet stands for: printable ones are themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(char) < 256:
        return ord(char)
    return [byte for byte in range(256) if byte not in kept][ord(char) - 256]


def _special_id(vocabulary: dict[str, int], token: Any, known: Sequence[str], configured: bool) -> int | None:
    """Id of a special token given as text or as {"content": text}; without a configuration, of a well-known name."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        return vocabulary.get(token)
    if configured:
        return None
    return next((vocabulary[name] for name in known if name in vocabulary), None)


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json where it names none."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{file} is not JSON: {error}") from error
            merged.update({key: value for key, value in content.items() if value is not None})
    return merged


def _download(name: str) -> Path:
    """Folder of a tokenizer on the Hugging Face hub (or in its local cache), by model name."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise DataError(f"there is no tokenizer at {name}; `flame train-tokenizer` makes one.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        raise DataError(
            f"no tokenizer at {name!r}: no such file or folder, and the Hugging Face hub did not give it ({error}). "
            f"Name a folder, bytes (one token a byte), or train:8192 (trained on the job's data)."
        ) from error


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
