"""Every job file that the project ships."""

from pathlib import Path

import pytest

from flame.config import load_job
from flame.plan import make_plan

FOLDER = Path(__file__).parents[2] / "train_configs"
FILES = sorted(FOLDER.glob("*.toml"))
SIZES = {"340M": (3.3e8, 4.5e8), "1.3B": (1.2e9, 1.5e9), "7B": (6.5e9, 7.5e9)}


def test_the_promised_files_are_there():
    names = {path.stem for path in FILES}
    promised = {f"{system}_{size}" for system in ("transformer", "gla") for size in SIZES}
    assert {"quickstart", "gla_340M_hybrid"} | promised <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_opens_without_remark_and_fits_a_node(path, caplog):
    job = load_job(path)
    assert not caplog.records
    plan = make_plan(job, 4)
    assert plan.memory.device < 140e9  # an H200
    assert (
        job.job.dump_folder == f"exp/{path.stem}" and job.checkpoint.enable and not job.checkpoint.last_save_model_only
    )
    for size, (least, most) in SIZES.items():
        if size in path.stem.split("_"):
            assert least < plan.parameters.total < most


def test_quickstart_needs_no_network_and_no_gpu():
    job = load_job(FOLDER / "quickstart.toml")
    assert [source.path for source in job.training.mixture()] == ["stdlib"]
    assert job.model.tokenizer_path.startswith("train:") and job.model.config is None
    assert job.training.steps * job.training.local_batch_size * job.training.seq_len < 500_000
    assert job.validation.enable and job.checkpoint.last_save_in_hf and job.generation.prompts
