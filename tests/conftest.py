"""Test-wide environment. Runs before any test imports triton, which decides at import whether it interprets kernels."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --run-slow or FLAME_TEST_ALL=1")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of golden cases (reference logits and gradients), named by FLAME_GOLDEN_DIR."""
    folder = os.environ.get("FLAME_GOLDEN_DIR")
    if not folder:
        pytest.skip("FLAME_GOLDEN_DIR is not set")
    return Path(folder)
