"""What each kind of source reads, and what it says of input that is missing, empty or malformed."""

import gzip
import json
import multiprocessing
import subprocess
import sys

import pytest
from corpus import Run, loader_of, recipe_of, take, texts, write_jsonl

from flame.data import SourceSettings
from flame.data.permutation import hash_text
from flame.data.sources import Malformed, Part, open_source
from flame.data.sources.text import PIECE_BYTES
from flame.errors import ConfigError, DataError


def read_all(settings: SourceSettings, part: Part | None = None, shards: int = 4) -> list:
    source = open_source(settings, "s", shards)
    if part is not None:
        source = source.restrict(part)
    return [document for unit in range(source.units) for document in source.read(unit, 0, None)]


def write_parquet(file, documents, key="text", row_group_size=10):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({key: documents}), file, row_group_size=row_group_size)
    return file


def test_standard_library_is_deterministic_and_its_parts_are_disjoint():
    settings = SourceSettings("stdlib")
    whole = read_all(settings)
    assert len(whole) > 300
    assert all(isinstance(text, str) and text.strip() for text in whole)
    train, held_out = (read_all(settings, Part(0.05, side)) for side in (False, True))
    assert sorted(train + held_out) == sorted(whole)
    assert 0.01 * len(whole) < len(held_out) < 0.12 * len(whole)
    code = (
        "from test_sources import *; from flame.data.permutation import hash_text\n"
        "print(hash_text(repr(read_all(SourceSettings('stdlib')))))"
    )
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=__file__.rsplit("/", 1)[0],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert int(again.stdout) == hash_text(repr(whole))


def test_standard_library_holds_neither_tests_nor_packages():
    from flame.data.sources.text import standard_library_files

    root, files = standard_library_files()
    parts = {part for file in files for part in file.relative_to(root).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests"}
    assert {"json", "argparse.py"} <= parts


def test_a_folder_of_text_files_is_one_document_a_file_in_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.md", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_all(SourceSettings(str(tmp_path))) == ["a.txt", "b.txt", "sub/c.md"]
    assert read_all(SourceSettings(str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("newline", ["\n", ""])
def test_a_large_text_file_is_cut_into_documents_without_losing_a_byte(tmp_path, newline):
    line = "é" * 99 + newline
    text = line * (int(2.5 * PIECE_BYTES) // len(line.encode()))
    (tmp_path / "big.txt").write_text(text, encoding="utf-8")
    pieces = read_all(SourceSettings(str(tmp_path / "big.txt")))
    assert len(pieces) == 3
    assert "".join(pieces) == text
    assert all(piece.endswith(line[-1]) for piece in pieces)


def test_lines_of_a_text_file_are_documents_when_asked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n  two\r\nthree")
    assert read_all(SourceSettings(str(tmp_path / "a.txt"), lines=True)) == ["one", "", "  two", "three"]


@pytest.mark.parametrize("packing", ["plain", "gz", "zst"])
def test_jsonl_is_read_plain_and_packed(tmp_path, packing):
    documents = texts("x", 50)
    file = write_jsonl(tmp_path / "a.jsonl", documents, "body")
    if packing == "gz":
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file = tmp_path / "b.jsonl.gz"
    if packing == "zst":
        import pyarrow

        file = tmp_path / "b.jsonl.zst"
        with pyarrow.CompressedOutputStream(str(file), "zstd") as out:
            out.write((tmp_path / "a.jsonl").read_bytes())
    assert read_all(SourceSettings(str(file), text_key="body")) == documents


def test_a_large_jsonl_index_is_kept_and_follows_the_file(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 4_000_000] * 5)
    settings = SourceSettings(str(file))
    assert len(read_all(settings)) == 5
    kept = list((tmp_path / "cache" / "index").glob("*.lines.npy"))
    assert len(kept) == 1
    changed = kept[0].stat().st_mtime_ns
    assert len(read_all(settings)) == 5
    assert kept[0].stat().st_mtime_ns == changed
    write_jsonl(file, ["y" * 4_000_000] * 6)
    assert len(read_all(settings)) == 6


@pytest.mark.parametrize("shards", [1, 4, 64])
def test_parquet_reads_every_row_once_however_it_is_cut(tmp_path, shards):
    documents = texts("p", 95)
    for index in range(2):
        write_parquet(tmp_path / f"{index}.parquet", documents[index * 40 : 40 + index * 55], row_group_size=30)
    settings = SourceSettings(str(tmp_path))
    assert read_all(settings, shards=shards) == documents
    halves = [read_all(settings, Part(0.3, side), shards) for side in (False, True)]
    assert sorted(filter(None, halves[0] + halves[1])) == sorted(documents)
    assert 10 < len(list(filter(None, halves[1]))) < 50
    recut = read_all(settings, Part(0.3, True), shards=7)
    assert sorted(filter(None, recut)) == sorted(filter(None, halves[1]))


def test_shuffled_parquet_units_can_be_entered_anywhere(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", texts("p", 40), row_group_size=40)
    source = open_source(SourceSettings(str(file)), "s", 1)
    whole = list(source.read(0, 0, 7))
    assert len(set(whole)) > 1
    assert [list(source.read(0, start, 7)) for start in range(len(whole) + 1)] == [
        whole[n:] for n in range(len(whole) + 1)
    ]


def test_a_saved_hugging_face_dataset_is_read_by_folder(tmp_path):
    import datasets

    documents = texts("h", 30)
    datasets.Dataset.from_dict({"text": documents, "other": list(range(30))}).save_to_disk(tmp_path / "saved")
    assert read_all(SourceSettings(str(tmp_path / "saved"))) == documents


@pytest.mark.parametrize("files", [1, 6])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_streamed_dataset_is_read_once_and_can_be_entered_anywhere(tmp_path, files, shards, monkeypatch):
    from flame.data.sources import huggingface

    monkeypatch.setattr(huggingface, "BLOCK_ROWS", 7)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    documents = texts("h", 60)
    for index in range(files):
        write_jsonl(tmp_path / f"{index}.jsonl", documents[index * 60 // files : (index + 1) * 60 // files])
    settings = SourceSettings("json", data_files=str(tmp_path / "*.jsonl"), streaming=True)
    assert sorted(read_all(settings, shards=shards)) == sorted(documents)
    held_out = [read_all(settings, Part(0.3, True), count) for count in (shards, 3)]
    assert sorted(filter(None, held_out[0])) == sorted(filter(None, held_out[1]))
    source = open_source(settings, "s", shards)
    whole = list(source.read(0, 0, 5))
    for start in (0, 1, 6, 7, 8, len(whole)):
        assert list(source.read(0, start, 5)) == whole[start:]


def test_streamed_and_parquet_sources_resume_on_another_layout(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts("a", 30))
    write_parquet(tmp_path / "b.parquet", texts("b", 90), row_group_size=30)
    sources = (
        SourceSettings("json", data_files=str(tmp_path / "a.jsonl"), streaming=True),
        SourceSettings(str(tmp_path / "b.parquet")),
    )
    recipe = recipe_of(sources)
    expected = Run(recipe, 1, 0, 1, 12).steps(8)
    first = Run(recipe, 2, 0, 1, 12)
    assert first.steps(5) == expected[:5]
    assert Run(recipe, 3, 0, 1, 12, first.state()).steps(3) == expected[5:]


@pytest.mark.parametrize(
    "line,problem",
    [('{"text": "cut', "not a JSON line"), ('{"body": "x"}', "no text under key 'text'"), ('{"text": 5}', "no text"),
     ("[1]", "no text"), ("\udcff", "not a JSON line")],
)  # fmt: skip
def test_malformed_jsonl_is_named_by_file_and_line_or_left_out_and_counted(tmp_path, line, problem):
    good = [json.dumps({"text": text}) for text in texts("g", 5)]
    file = tmp_path / "a.jsonl"
    file.write_bytes("\n".join([*good[:2], line, *good[2:]]).encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {problem}.*on_malformed = 'skip'"):
        take(loader_of(recipe_of([SourceSettings(str(file))])), 50)
    loader = loader_of(recipe_of([SourceSettings(str(file))], on_malformed="skip", virtual_shards=1))
    take(loader, 50)
    progress = loader.progress()["a.jsonl"]
    assert abs(progress["skipped"] - progress["epoch"]) <= 1
    assert progress["epoch"] > 2


def test_one_good_document_among_bad_ones_is_found_by_every_shard(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + '{"text": ""}\n{"body": 1}\n' * 9)
    rows = take(loader_of(recipe_of([SourceSettings(str(file))], on_malformed="skip", virtual_shards=32)), 32)
    assert len(rows) == 32


def test_a_file_or_glob_is_read_by_flame_even_where_streams_are_asked_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts("a", 3))
    for path in (tmp_path / "a.jsonl", tmp_path / "*.jsonl"):
        assert read_all(SourceSettings(str(path), streaming=True)) == texts("a", 3)


def test_a_worker_says_what_is_wrong_without_its_traceback(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    loader = loader_of(recipe_of([SourceSettings(str(tmp_path / "a.jsonl"))]), workers=1)
    with pytest.raises(DataError) as caught:
        take(loader, 1)
    loader.close()
    assert "Traceback" not in str(caught.value)
    assert "a.jsonl:1" in str(caught.value)


def test_a_worker_that_is_killed_ends_the_job_with_advice(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts("a", 50))
    loader = loader_of(recipe_of([SourceSettings(str(tmp_path / "a.jsonl"))]), workers=1)
    before = set(multiprocessing.active_children())
    take(loader, 1)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(DataError, match=r"a data worker died .* lower training\.dataloader\.num_workers"):
        take(loader, 1000)  # some rows were made before
    loader.close()


def test_a_source_of_malformed_documents_only_is_an_error_and_not_a_hang(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 3)
    with pytest.raises(DataError, match="no usable document"):
        take(loader_of(recipe_of([SourceSettings(str(tmp_path / "a.jsonl"))], on_malformed="skip")), 1)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    (document,) = read_all(SourceSettings(str(tmp_path / "a.txt")))
    assert isinstance(document, Malformed)
    assert "a.txt: not utf-8 text (invalid start byte at byte 3)" in document.reason


@pytest.mark.parametrize(
    "path,problem",
    [("{}/no.jsonl", "does not exist"), ("{}/x*.jsonl", "no file matches"), ("{}/empty.jsonl", "is empty"),
     ("{}/nothing", "holds no"), ("{}/broken.parquet", "not a readable Parquet"), ("{}/missing/dir", "no such file")],
)  # fmt: skip
def test_a_source_that_is_not_there_is_an_error_that_names_it(tmp_path, path, problem):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=problem) as caught:
        open_source(SourceSettings(path.format(tmp_path)), "s", 1)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", ["x"], key="content")
    with pytest.raises(DataError, match="no column 'text'; it has content"):
        open_source(SourceSettings(str(file)), "s", 1)


def test_an_unknown_dataset_name_is_an_error_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="could not be loaded as a Hugging Face dataset"):
        open_source(SourceSettings("nobody/nothing"), "s", 1)


def test_an_empty_held_out_part_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = open_source(SourceSettings(str(tmp_path / "a.txt")), "s", 1)
    with pytest.raises(DataError, match="none falls into its held-out part"):
        source.restrict(Part(1e-9, True))


def test_settings_refuse_what_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="weight"):
        SourceSettings("stdlib", weight=-1)
    with pytest.raises(ConfigError, match="kind"):
        SourceSettings("stdlib", kind="csv")
    with pytest.raises(DataError, match="two data sources are named"):
        recipe_of([SourceSettings("stdlib", name="x"), SourceSettings("stdlib", name="x")])


def test_files_are_read_without_the_datasets_package(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts("a", 3))
    code = (
        "import sys; sys.modules.update(datasets=None, torchdata=None, pyarrow=None, transformers=None)\n"
        "from corpus import *\n"
        f"print(len(take(loader_of(recipe_of([SourceSettings({str(tmp_path / 'a.jsonl')!r})])), 3)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rsplit("/", 1)[0],
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "3", done.stderr
