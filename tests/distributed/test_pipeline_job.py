"""Jobs in a pipeline: the same run as on one process, on any layout in turn, with validation, samples and export."""

import re

import pytest
from jobs import JOB, Run, write_job
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
TIED = JOB.replace("num_hidden_layers = 2", "num_hidden_layers = 3\ntie_word_embeddings = true")
PIPELINE = ["--parallelism.pipeline_parallel_degree", "2"]
SAMPLES = ["--generation.prompts", '["the quick"]', "--generation.freq", "4", "--lr_scheduler.total_steps", "12"]
FIGURES = re.compile(r"step: +(\d+)  (?:loss: +(\S+)  grad_norm: +(\S+)|validation: (\S+))|Sample: (.*)")


def run(folder, path, name, world_size, *arguments):
    """The log's losses, gradient norms, validation figures and samples."""
    job = Run(folder, [path, "--job.dump_folder", folder / name, *SAMPLES, *arguments], world_size)
    assert job.wait() == [0] * world_size, "\n".join(job.text(rank) for rank in range(world_size))
    return FIGURES.findall(job.text())


def assert_same_text(found, expected):
    """Figures may differ in their last printed digit."""
    assert [entry[0] for entry in found] == [entry[0] for entry in expected]
    for entry, other in zip(found, expected):
        assert entry[4] == other[4]
        for value, wanted in zip(entry[1:4], other[1:4]):
            assert bool(value) == bool(wanted)
            assert not value or float(value) == pytest.approx(float(wanted), abs=2e-3)


def test_a_run_moves_between_a_pipeline_and_sharded_data(tmp_path):
    path = write_job(tmp_path, TIED)
    expected = run(tmp_path, path, "one", 1)
    found = []
    for steps, layout in ((4, PIPELINE), (8, []), (12, PIPELINE)):
        found += run(tmp_path, path, "moved", 2, *layout, "--training.steps", steps)
    # Every end of a job samples and validates; the run that was not interrupted does the former at steps 4, 8 and 12 too.
    assert_same_text([entry for entry in found if entry[1]], [entry for entry in expected if entry[1]])
    assert [entry[4] for entry in found if entry[4]] == [entry[4] for entry in expected if entry[4]]
    assert found[-1] == expected[-1]
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("one", "moved")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_a_whole_job_is_that_of_one_process(schedule, tmp_path):
    path = write_job(tmp_path, JOB.replace("num_hidden_layers = 2", "num_hidden_layers = 4"))
    expected = run(tmp_path, path, "one", 1)
    arguments = [*PIPELINE, "--parallelism.pipeline_parallel_schedule", schedule]
    assert_same_text(run(tmp_path, path, "two", 2, *arguments), expected)


def test_more_stages_than_layers_end_the_job_with_one_clear_line(tmp_path):
    path = write_job(tmp_path)
    job = Run(tmp_path, [path, *PIPELINE, "--model.num_hidden_layers", "1"], 2)
    assert job.wait() == [1, 1]
    assert "error: parallelism.pipeline_parallel_degree = 2" in job.text()
    assert "the model has 1 layers" in job.text()
