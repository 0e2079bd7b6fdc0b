"""The record of a job that was killed and resumed reads like that of one that was not."""

import json

import pytest
from jobs import Run, write_job


def figures(folder):
    """(step, loss, tokens by source) of every line of training, in the order of the file."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = [{key: value for key, value in line.items() if key.startswith("tokens/")} for line in lines]
    return [(line["step"], line["loss"], tokens) for line, tokens in zip(lines, counted) if "loss" in line]


def run_to_the_end(folder, *overrides):
    run = Run(folder, [folder / "job.toml", *overrides], 1)
    assert run.wait() == [0], run.text()


@pytest.mark.distributed
def test_a_killed_job_has_every_step_once_with_the_figures_of_an_undisturbed_one(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
        write_job(folder)
    run_to_the_end(calm)
    run = Run(killed, [killed / "job.toml"], 1)
    run.wait_for("step:     7 ")
    run.kill()
    run.wait()
    run_to_the_end(killed)
    expected, found = figures(calm), figures(killed)
    assert [step for step, *_ in found] == list(range(1, 13))
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    counts = [list(tokens.values()) for _, _, tokens in found]
    assert all(counts) and counts == [list(tokens.values()) for _, _, tokens in expected]
    assert all(later > earlier for [earlier], [later] in zip(counts, counts[1:]))
    assert (killed / "run" / "metrics.left_behind.jsonl").is_file()
