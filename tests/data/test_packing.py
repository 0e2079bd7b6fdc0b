"""How documents become rows, labels and document bounds; mixtures; batches."""

import pytest
import torch
from corpus import loader_of, mixture, recipe_of, take, texts, write_jsonl

from flame.data import SourceSettings, Tokenizer
from flame.data.settings import PackingSettings
from flame.data.shard import IGNORED
from flame.errors import ConfigError, DataError

EOS = 257
TOKENIZER = Tokenizer.byte_level()


@pytest.fixture
def documents():
    return texts("d", 20)


def shard_rows(tmp_path, documents, count, **settings):
    """Rows of a single unshuffled shard."""
    file = write_jsonl(tmp_path / "d.jsonl", documents)
    recipe = recipe_of([SourceSettings(str(file))], virtual_shards=1, shuffle=False, **settings)
    return take(loader_of(recipe), count)


def test_fixed_rows_are_the_concatenated_documents_and_no_token_is_lost(tmp_path, documents):
    rows = shard_rows(tmp_path, documents, 60, seq_len=32)
    stream = [token for document in documents for token in [*TOKENIZER.encode(document), EOS]] * 3
    inputs = torch.cat([row.input_ids[0] for row in rows]).tolist()
    labels = torch.cat([row.labels[0] for row in rows]).tolist()
    # an unshuffled second epoch starts one document further: compare the first epoch only
    length = len(stream) // 3
    assert len(inputs) > length
    assert inputs[:length] == stream[:length]
    assert labels[: length - 1] == stream[1:length]
    assert IGNORED not in labels


@pytest.mark.parametrize("context_len", [None, 7, 32])
def test_varlen_bounds_are_those_of_documents_and_labels_stay_inside(tmp_path, documents, context_len):
    rows = shard_rows(tmp_path, documents, 12, seq_len=48, varlen=True, context_len=context_len)
    encoded = [[*TOKENIZER.encode(document), EOS] for document in documents]
    place = (0, 0)  # document and offset
    for row in rows:
        bounds = row.cu_seqlens.tolist()
        assert row.input_ids.shape == (1, 48)
        assert bounds[0] == 0 and bounds[-1] == 48
        assert bounds == sorted(set(bounds))
        assert (
            max(end - start for start, end in zip(bounds, bounds[1:])) <= row.max_seqlen == min(context_len or 48, 48)
        )
        for start, end in zip(bounds, bounds[1:]):
            document, offset = place
            after = offset + end - start
            assert row.input_ids[0, start:end].tolist() == encoded[document][offset:after]
            assert row.labels[0, start:end].tolist() == (encoded[document] + [IGNORED])[offset + 1 : after + 1]
            place = (document + 1, 0) if after == len(encoded[document]) else (document, after)


def test_several_packed_rows_become_one(tmp_path):
    recipe = recipe_of(mixture(tmp_path), seq_len=16, varlen=True)
    singles, (pair,) = take(loader_of(recipe), 2), take(loader_of(recipe, batch=2), 1)
    assert pair.input_ids.shape == pair.labels.shape == (1, 32)
    assert torch.equal(pair.input_ids[0], torch.cat([single.input_ids[0] for single in singles]))
    one, other = (single.cu_seqlens for single in singles)
    assert torch.equal(pair.cu_seqlens, torch.cat([one, other[1:] + 16]))
    assert pair.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("bos,eos", [(False, False), (True, False), (True, True)])
def test_bos_and_eos_are_added_when_asked(tmp_path, bos, eos):
    from flame.data import DataSettings, open_recipe

    write_jsonl(tmp_path / "a.jsonl", ["ab", "c"])
    packing = PackingSettings(5 + 2 * bos + 2 * eos, add_bos=bos, add_eos=eos)
    settings = DataSettings((SourceSettings(str(tmp_path / "a.jsonl")),), packing, virtual_shards=1, shuffle=False)
    (batch,) = take(loader_of(open_recipe(settings, TOKENIZER)), 1)
    want = [256] * bos + [97, 98] + [EOS] * eos + [256] * bos + [99] + [EOS] * eos
    assert batch.input_ids[0].tolist()[: len(want)] == want


def test_a_tokenizer_without_eos_is_refused_before_training(tmp_path):
    import tokenizers

    from flame.data import DataSettings, open_recipe

    plain = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")))
    with pytest.raises(DataError, match="no eos token"):
        open_recipe(DataSettings((SourceSettings("stdlib"),), PackingSettings(8)), plain)


def test_mixture_shares_are_of_tokens(tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", ["s" * 20] * 50)
    long = write_jsonl(tmp_path / "long.jsonl", ["l" * 700] * 10)
    never = write_jsonl(tmp_path / "never.jsonl", ["n" * 10] * 10)
    sources = [SourceSettings(str(file), weight=weight) for file, weight in ((short, 5), (long, 3), (never, 0))]
    batches = take(loader_of(recipe_of(sources, seq_len=1024), batch=12), 50)
    totals = {name: sum(batch.source_tokens[name] for batch in batches) for name in batches[0].source_tokens}
    whole = sum(totals.values())
    assert whole == 50 * 12 * 1024
    assert abs(totals["short.jsonl"] / whole - 5 / 8) < 0.01
    assert abs(totals["long.jsonl"] / whole - 3 / 8) < 0.01
    assert totals["never.jsonl"] == 0
    counted = {"short.jsonl": 0, "long.jsonl": 0, "never.jsonl": 0}
    for batch in batches:
        counted["short.jsonl"] += int((batch.input_ids == ord("s")).sum())
    assert counted["short.jsonl"] == pytest.approx(totals["short.jsonl"] * 20 / 21, rel=0.01)


def test_first_rows_of_the_shards_follow_the_shares(tmp_path):
    sources = [SourceSettings(entry.path, weight=entry.weight) for entry in mixture(tmp_path)]
    (batch,) = take(loader_of(recipe_of(sources, seq_len=2, virtual_shards=400), batch=400), 1)
    assert 0.68 < batch.source_tokens["a.jsonl"] / 800 < 0.82


def test_new_weights_apply_from_the_resume_on_and_to_what_comes_then(tmp_path):
    before = [SourceSettings(entry.path, weight=entry.weight) for entry in mixture(tmp_path)]
    after = [SourceSettings(entry.path, weight=1) for entry in before]
    loader = loader_of(recipe_of(before, seq_len=512), batch=12)
    take(loader, 50)
    changed = loader_of(recipe_of(after, seq_len=512), batch=12)
    changed.load_state_dict(loader.state_dict())
    batches = take(changed, 50)
    assert sum(batch.source_tokens["a.jsonl"] for batch in batches) / (50 * 12 * 512) == pytest.approx(0.5, abs=0.01)


def test_sources_can_come_and_go_at_a_resume(tmp_path, caplog):
    old = mixture(tmp_path)
    new = SourceSettings(str(write_jsonl(tmp_path / "c.jsonl", texts("c", 30))))
    loader = loader_of(recipe_of(old), batch=12)
    take(loader, 5)
    changed = loader_of(recipe_of([old[1], new], seed=7), batch=12)
    changed.load_state_dict(loader.state_dict())
    batches = take(changed, 20)
    assert batches[0].row_numbers[0] == 60
    assert min(sum(batch.source_tokens[name] for batch in batches) for name in ("b.jsonl", "c.jsonl")) > 3000
    for text in ("'c.jsonl' is new", "'a.jsonl' of the checkpoint is not", "goes on with seed 42"):
        assert text in caplog.text


def test_seeds_give_different_orders_and_epochs_too(tmp_path):
    def starts(seed):
        file = write_jsonl(tmp_path / "one.jsonl", [chr(97 + index) for index in range(20)])
        recipe = recipe_of([SourceSettings(str(file))], seed=seed, seq_len=40, virtual_shards=1)
        return [batch.input_ids[0, ::2].tolist() for batch in take(loader_of(recipe), 2)]

    one, other = starts(1), starts(2)
    assert one[0] != other[0]
    assert one[0] != one[1]
    assert all(sorted(epoch) == list(range(97, 117)) for epoch in one + other)


def test_a_batch_moves_as_a_whole(tmp_path):
    (batch,) = take(loader_of(recipe_of(mixture(tmp_path), varlen=True), batch=2), 1)
    moved = batch.to("meta", non_blocking=True)
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert moved.row_numbers == batch.row_numbers
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_impossible_packing_is_refused():
    with pytest.raises(ConfigError, match="seq_len"):
        PackingSettings(0)
    with pytest.raises(ConfigError, match="context_len"):
        PackingSettings(8, varlen=True, context_len=0)
