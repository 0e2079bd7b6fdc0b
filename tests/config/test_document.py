"""Generated documentation, and that no key is declared without use."""

import inspect
import re
from pathlib import Path

import pytest

import flame
from flame.config.data import flat_mixture
from flame.config.document import PAGE, help_text, keys_of, page, tables

ALL_KEYS = [key.name for name, cls in tables().items() for key in keys_of(cls, name)]


def test_reference_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m flame.config.document"


def test_help_lists_every_key():
    text = help_text()
    missing = [key for key in ALL_KEYS if ".sources" not in key and f"--{key}" not in text]
    assert not missing


@pytest.fixture(scope="module")
def code_outside_config():
    root = Path(flame.__file__).parent
    files = [path for path in root.rglob("*.py") if path.parent not in (root / "config", root / "plan")]
    # What [training] and [validation] say about data is read through their mixture().
    return "\n".join([*(path.read_text(encoding="utf-8") for path in files), inspect.getsource(flat_mixture)])


@pytest.mark.parametrize("key", ALL_KEYS)
def test_every_key_is_read_outside_the_config(key, code_outside_config):
    name = key.rsplit(".", 1)[1]
    read = re.search(rf"\.{name}\b", code_outside_config) is not None
    assert read, f"{key} is declared and nothing reads it"
