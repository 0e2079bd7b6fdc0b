"""The validation rows are the same at every evaluation, on every layout, and held out of training."""

import pytest
import torch
from corpus import loader_of, mixture, recipe_of, rows_of, take, texts, write_jsonl

from flame.data import RankSettings, SourceSettings, Tokenizer, ValidationLoader
from flame.errors import DataError


def validation_rows(recipe, rows, world=1, batch=1):
    loaders = [ValidationLoader(recipe, RankSettings(rank, world, batch), rows) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    found = [row for loader in loaders for entry in loader for row in rows_of(entry, 32)]
    return sorted(row for row in found if row[0] >= 0), [row for row in found if row[0] < 0]


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("world,batch", [(2, 1), (3, 2), (5, 4)])
def test_every_layout_evaluates_the_same_rows(tmp_path, varlen, world, batch):
    recipe = recipe_of(mixture(tmp_path), varlen=varlen)
    expected, padding = validation_rows(recipe, 17)
    assert len(expected) == 17 and not padding
    found, padding = validation_rows(recipe, 17, world, batch)
    assert found == expected
    assert all(set(labels) == {-100} for _, _, labels in padding)


def test_rows_come_again_and_do_not_depend_on_the_seed(tmp_path):
    one = ValidationLoader(recipe_of(mixture(tmp_path), seed=1), RankSettings(), 9)
    first, second = list(one), list(one)
    other = list(ValidationLoader(recipe_of(mixture(tmp_path), seed=2), RankSettings(), 9))
    for batches in (second, other):
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, batches, strict=True))


def test_all_of_the_data_is_read_once(tmp_path):
    loader = ValidationLoader(recipe_of(mixture(tmp_path), varlen=True), RankSettings(), None)
    labels = sum(int((batch.labels != -100).sum()) for batch in loader)
    encode = Tokenizer.byte_level().encode
    # every document of n bytes has n + 1 ids with its eos, and n labels
    assert labels == sum(len(encode(text)) for text in texts("a", 23) + texts("b", 40))
    assert sum(sum(batch.source_tokens.values()) for batch in loader) == labels + 63


def test_data_shorter_than_the_asked_rows_is_padded_and_not_repeated(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    (batch,) = ValidationLoader(recipe_of([SourceSettings(str(file))]), RankSettings(), 50)
    assert batch.input_ids[0, :4].tolist() == [97, 98, 99, 257]
    assert batch.labels[0].tolist() == [98, 99, 257] + [-100] * 29


def test_held_out_documents_are_never_trained(tmp_path):
    documents = [f"document {index} " * 3 for index in range(200)]
    file = write_jsonl(tmp_path / "a.jsonl", documents)
    settings = {"holdout": 0.1, "seq_len": 32}
    sources = [SourceSettings(str(file))]
    from flame.data import DataSettings, PackingSettings, open_recipe

    data = DataSettings(tuple(sources), PackingSettings(32), virtual_shards=12, holdout=settings["holdout"])
    tokenizer = Tokenizer.byte_level()
    decode = Tokenizer.byte_level().decode
    train = "".join(decode(batch.input_ids[0]) for batch in take(loader_of(open_recipe(data, tokenizer)), 900))
    held = ValidationLoader(open_recipe(data, tokenizer, held_out=True), RankSettings(), None)
    text = "".join(decode(batch.input_ids[0]) for batch in held)
    numbers = {index for index in range(200) if f"document {index} d" in text}
    assert 8 <= len(numbers) <= 35
    assert not any(f"document {index} d" in train for index in numbers)
    assert sum(f"document {index} d" in train for index in range(200)) > 0.9 * (200 - len(numbers))


def test_no_validation_document_is_an_error(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [""])
    with pytest.raises(DataError, match="holds no document"):
        len(ValidationLoader(recipe_of([SourceSettings(str(file))]), RankSettings(), 5))
