"""Tiles come from the table, fall back to the default, and are never ones known to be miscompiled."""

import json

import pytest
import torch

from flame.errors import FlameError
from flame.kernels import tiles

CPU = torch.device("cpu")
DEFAULT, SHIPPED = {"BT": 16}, {"BT": 64}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    monkeypatch.setattr(tiles, "capability", lambda device: "9.0")
    caches = (tiles.shipped_tiles, tiles._chosen, tiles.deny_list)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def deny(folder, versions, tile):
    entry = {"op": "op", "capability": "9.0", "triton": versions, "match": "forward", "tile": tile, "why": "issue 1"}
    (folder / "deny.json").write_text(json.dumps([entry]))


def test_unknown_key_takes_the_default(tables):
    assert tiles.choose("op", "forward D=64", DEFAULT, CPU) == DEFAULT


def test_written_entry_is_chosen(tables):
    tiles.write_tiles("op", "cpu", {"forward D=64": SHIPPED})
    assert tiles.choose("op", "forward D=64", DEFAULT, CPU) == SHIPPED
    assert tiles.choose("op", "forward D=128", DEFAULT, CPU) == DEFAULT


def test_denied_entry_falls_back_to_the_default(tables):
    tiles.write_tiles("op", "cpu", {"forward D=64": SHIPPED})
    deny(tables, ["3.0", "99.0"], SHIPPED)
    assert tiles.choose("op", "forward D=64", DEFAULT, CPU) == DEFAULT


def test_denied_default_is_an_error_with_a_way_out(tables):
    deny(tables, ["3.0", "99.0"], DEFAULT)
    with pytest.raises(FlameError, match="FLAME_BACKEND=chunked"):
        tiles.choose("op", "forward D=64", DEFAULT, CPU)


def test_denial_ends_with_its_triton_versions(tables):
    deny(tables, ["1.0", "3.0"], DEFAULT)
    assert tiles.choose("op", "forward D=64", DEFAULT, CPU) == DEFAULT


def test_forced_tile_holds_only_inside_its_block(tables):
    with tiles.using("op", {"forward D=64": SHIPPED}):
        assert tiles.choose("op", "forward D=64", DEFAULT, CPU) == SHIPPED
    assert tiles.choose("op", "forward D=64", DEFAULT, CPU) == DEFAULT
