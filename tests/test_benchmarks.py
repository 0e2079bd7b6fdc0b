"""Benchmarks run by hand; what they import from each other and from flame must at least be there."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_imports(name):
    importlib.import_module(f"benchmarks.{name}")
