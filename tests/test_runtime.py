"""Settings of the process as a whole."""

import os

import pytest

from flame.errors import ConfigError
from flame.runtime import writable_folder


def test_a_folder_for_the_run_is_made(tmp_path):
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert writable_folder(tmp_path / "a" / "b").is_dir()


def test_a_run_that_could_not_write_is_refused_at_its_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="job.dump_folder = .*file.* cannot be made"):
            writable_folder(folder)
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="may not be written to"):
        writable_folder(tmp_path)
