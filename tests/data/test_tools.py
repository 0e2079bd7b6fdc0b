"""`flame tokenize` and `flame train-tokenizer`, and reading what they write."""

import argparse
import json

import pytest
import torch
from corpus import Run, loader_of, recipe_of, take, texts, write_jsonl

from flame.data import SourceSettings, Tokenizer, tokenize, train_tokenizer
from flame.data.sources import Part, open_source
from flame.errors import DataError


def run(module, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.main(parser.parse_args(words))


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", [*texts("a", 40), "", *texts("b", 7)])


def write_ids(corpus, folder, **options):
    source = open_source(SourceSettings(str(corpus)), "same", 1)
    return tokenize.tokenize(source, Tokenizer.byte_level(), folder, **options)


def test_train_tokenizer_writes_a_folder_that_loads(tmp_path, corpus):
    assert run(train_tokenizer, "--source", str(corpus), "--vocab-size", "280", "--output", str(tmp_path / "tok")) == 0
    assert Tokenizer.load(tmp_path / "tok").vocab_size == 280


def test_tokenize_writes_a_folder_that_is_a_source(tmp_path, corpus, capsys):
    words = ("--source", str(corpus), "--tokenizer", "bytes", "--output", str(tmp_path / "ids"), "--workers", "1")
    assert run(tokenize, *words) == 0
    assert "48 documents" in capsys.readouterr().out
    source = open_source(SourceSettings(str(tmp_path / "ids")), "s", 1, Tokenizer.byte_level().fingerprint)
    assert source.tokenized and source.units == 48
    with pytest.raises(DataError, match="exists already"):
        run(tokenize, *words)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_pretokenized_rows_equal_rows_tokenized_online(tmp_path, corpus, varlen, holdout):
    write_ids(corpus, tmp_path / "ids")
    online, stored = (
        recipe_of([SourceSettings(str(path), name="same")], varlen=varlen, holdout=holdout)
        for path in (corpus, tmp_path / "ids")
    )
    for one, other in zip(take(loader_of(online, batch=5), 30), take(loader_of(stored, batch=5), 30)):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)


def test_a_run_can_go_on_with_the_tokenized_form_of_its_source(tmp_path, corpus):
    write_ids(corpus, tmp_path / "ids")
    online, stored = (recipe_of([SourceSettings(str(path), name="same")]) for path in (corpus, tmp_path / "ids"))
    expected = Run(online, 1, 0, 1, 12).steps(6)
    first = Run(online, 2, 0, 1, 12)
    first.steps(3)
    assert Run(stored, 4, 0, 1, 12, first.state()).steps(3) == expected[3:]


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_do_not_depend_on_the_number_of_parts_or_workers(tmp_path, corpus, workers, monkeypatch):
    write_ids(corpus, tmp_path / "one")
    monkeypatch.setattr(tokenize, "_UNITS_PER_PART", 9)
    metadata = write_ids(corpus, tmp_path / "many", workers=workers)
    assert len(metadata["parts"]) >= 6
    one, many = (open_source(SourceSettings(str(tmp_path / name)), "s", 1) for name in ("one", "many"))
    assert [one.document(i).tolist() for i in range(48)] == [many.document(i).tolist() for i in range(48)]
    assert one.keys().tolist() == many.keys().tolist()


def test_parquet_keeps_its_held_out_part_when_tokenized(tmp_path):
    from test_sources import write_parquet

    file = write_parquet(tmp_path / "a.parquet", texts("p", 60))
    write_ids(file, tmp_path / "ids")
    source = open_source(SourceSettings(str(file)), "s", 3).restrict(Part(0.3, True))
    stored = open_source(SourceSettings(str(tmp_path / "ids")), "s", 3).restrict(Part(0.3, True))
    online = [text for unit in range(source.units) for text in source.read(unit, 0, None) if text]
    ids = [document.tolist() for unit in range(stored.units) for document in stored.read(unit, 0, None)]
    assert ids == [Tokenizer.byte_level().encode(text) for text in online]


def test_malformed_documents_are_refused_or_kept_as_empty_ones(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\nnonsense\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2.*--on-malformed skip"):
        write_ids(file, tmp_path / "ids")
    assert not (tmp_path / "ids").exists()
    assert not list(tmp_path.glob("ids*"))
    assert write_ids(file, tmp_path / "ids", strict=False)["skipped"] == 1
    source = open_source(SourceSettings(str(tmp_path / "ids")), "s", 1)
    assert [len(source.document(index)) for index in range(3)] == [3, 0, 3]


def test_another_tokenizer_is_refused(tmp_path, corpus):
    write_ids(corpus, tmp_path / "ids")
    with pytest.raises(DataError, match="was tokenized with tokenizer"):
        open_source(SourceSettings(str(tmp_path / "ids")), "s", 1, "other")


def test_a_cut_file_is_refused(tmp_path, corpus):
    write_ids(corpus, tmp_path / "ids")
    file = tmp_path / "ids" / "tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match="incomplete"):
        open_source(SourceSettings(str(tmp_path / "ids")), "s", 1)


def test_a_newer_format_is_refused(tmp_path, corpus):
    write_ids(corpus, tmp_path / "ids")
    file = tmp_path / "ids" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(DataError, match="version 2"):
        open_source(SourceSettings(str(tmp_path / "ids")), "s", 1)
