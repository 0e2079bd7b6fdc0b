import json
import time

import pytest
import torch

from flame.config.sections import JobConfig, Profiling
from flame.metrics import MetricsLogger, Profiler, Throughput
from flame.metrics.throughput import PEAK_FLOPS, peak_flops

FIGURES = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3}


def make_logger(folder, resumed_from=0, **metrics):
    job = JobConfig()
    for name, value in metrics.items():
        setattr(job.metrics, name, value)
    throughput = Throughput(flops_per_token=6e6, ranks=2, device=torch.device("cpu"))
    return MetricsLogger(job, folder, throughput, resumed_from, is_main=True)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_reading_is_a_line_with_rates(tmp_path, caplog):
    caplog.set_level("INFO")
    log = make_logger(tmp_path)
    with log.throughput.waiting_for_data():
        time.sleep(0.02)
    log.step_done(1, tokens=1000)
    log.log(1, FIGURES)
    log.close()
    (line,) = lines(tmp_path)
    assert line["step"] == 1 and line["loss"] == 2.5
    assert line["tflops"] == pytest.approx(line["tokens_per_second"] * 6e6 / 1e12)
    assert line["tokens_per_second"] == pytest.approx(1000 / 2 / line["seconds_per_step"])
    assert 0 < line["data_wait_percent"] <= 100
    assert "mfu_percent" not in line, "the rate of a CPU is not known and must not be guessed"
    assert "loss:   2.5000" in caplog.text


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    log = make_logger(tmp_path)
    for step in range(1, 6):
        log.log(step, FIGURES)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    log = make_logger(tmp_path, resumed_from=3)
    log.log(4, {**FIGURES, "loss": 1.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 1.0)]


def test_tensorboard_events_are_written_when_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    log = make_logger(tmp_path, enable_tensorboard=True)
    log.log(1, FIGURES)
    log.close()
    assert list((tmp_path / "tb").glob("events.*"))


def test_a_missing_package_is_reported_and_left_out(tmp_path, caplog):
    log = make_logger(tmp_path, enable_wandb=True)
    log.log(1, FIGURES)
    log.close()
    assert "wandb is not installed" in caplog.text


def test_the_known_rate_of_a_device_follows_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda")) == PEAK_FLOPS["H100 PCIe"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert peak_flops(torch.device("cuda")) is None


def test_traces_are_written_at_their_steps(tmp_path):
    options = Profiling(enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=1)
    with Profiler(options, tmp_path, rank=0, device=torch.device("cpu")) as profiler:
        for _ in range(6):
            torch.ones(2) + 1
            profiler.step()
    assert sorted(path.parent.name for path in tmp_path.rglob("rank_0.json.gz")) == ["step_3", "step_6"]
