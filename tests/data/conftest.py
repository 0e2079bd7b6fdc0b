import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def index_cache(tmp_path, monkeypatch):
    """Indices of the test's files stay with the test."""
    monkeypatch.setenv("FLAME_CACHE", str(tmp_path / "cache"))
