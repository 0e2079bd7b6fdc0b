"""Tokenizers: round trips, the files transformers reads, special tokens, and what does not fit."""

import json
import pickle

import pytest

from flame.data import Tokenizer
from flame.errors import DataError

TEXT = "def f(x):\n\treturn 'é' * x  # 日本 \U0001f525\n"


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train([TEXT * 3, "for index in range(10): print(index)\n" * 20], 290)


def test_byte_tokenizer_is_one_id_a_byte():
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    everything = "".join(chr(code) for code in range(1, 0x250))
    assert tokenizer.encode(everything) == list(everything.encode())


def test_training_is_deterministic_and_the_text_comes_back(trained):
    again = Tokenizer.train([TEXT * 3, "for index in range(10): print(index)\n" * 20], 290)
    assert again.fingerprint == trained.fingerprint
    assert trained.vocab_size == 290
    assert trained.decode(trained.encode(TEXT)) == TEXT
    assert len(trained.encode(TEXT)) < len(TEXT.encode())


def test_batches_have_the_ids_of_single_texts(trained):
    texts = [TEXT, "", "x", TEXT[::-1]]
    assert [ids.tolist() for ids in trained.encode_batch(texts)] == [trained.encode(text) for text in texts]


def test_bos_and_eos_are_added_when_asked(trained):
    ids = trained.encode("x")
    assert trained.encode("x", bos=True, eos=True) == [trained.bos_id, *ids, trained.eos_id]
    assert trained.decode(trained.encode("x", bos=True, eos=True), skip_special_tokens=True) == "x"


def test_saved_tokenizer_loads_here_and_in_transformers(trained, tmp_path):
    trained.save(tmp_path / "tok")
    loaded = Tokenizer.load(tmp_path / "tok")
    assert (loaded.fingerprint, loaded.bos_id, loaded.eos_id) == (trained.fingerprint, trained.bos_id, trained.eos_id)
    assert Tokenizer.load(tmp_path / "tok" / "tokenizer.json").fingerprint == trained.fingerprint
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tok"))
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == trained.encode(TEXT)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (trained.bos_id, trained.eos_id)
    assert theirs.decode(trained.encode(TEXT)) == TEXT
    assert len(theirs) == trained.vocab_size


def test_what_transformers_saves_loads_here_with_added_tokens(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained.backend, eos_token="<|end_of_text|>", pad_token="<pad>"
    )
    theirs.add_tokens(["<new>"])
    theirs.save_pretrained(str(tmp_path))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == len(theirs) == 292
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, trained.eos_id, theirs.pad_token_id)
    assert loaded.encode("a<new>b") == theirs("a<new>b", add_special_tokens=False)["input_ids"]
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").config == loaded.config


def test_well_known_special_tokens_are_found_without_a_configuration(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 5}, "a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, 6)


def test_saved_padding_and_truncation_do_not_reach_the_data(trained, tmp_path):
    trained.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).encode(TEXT) == trained.encode(TEXT)


def test_a_tokenizer_survives_pickling(trained):
    other = pickle.loads(pickle.dumps(trained))
    assert (other.encode(TEXT), other.eos_id) == (trained.encode(TEXT), trained.eos_id)


def test_a_tokenizer_larger_than_the_model_is_refused(trained):
    trained.check_fits(290)
    with pytest.raises(DataError, match="has 290 ids but the model's vocab_size is 289"):
        trained.check_fits(289)


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="there is no tokenizer at"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(DataError, match="hub did not give it"):
        Tokenizer.load("nobody/nothing")
    with pytest.raises(DataError, match="at least 258"):
        Tokenizer.train(["x"], 100)
