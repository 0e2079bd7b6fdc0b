import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from flame.config.sections import JobConfig, Profiling
from flame.metrics import MetricsLogger, Profiler, Throughput, source_figures, throughput
from flame.metrics.throughput import peak_flops

FIGURES = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3}


def make_logger(folder, resumed_from=0, **metrics):
    job = JobConfig()
    for name, value in metrics.items():
        setattr(job.metrics, name, value)
    rates = Throughput(flops_per_token=6e6, ranks=2, device=torch.device("cpu"))
    return MetricsLogger(job, folder, rates, resumed_from, is_main=True)


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


def test_a_resumed_run_goes_on_where_its_checkpoint_was_and_sets_the_rest_aside(tmp_path):
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
    left = (tmp_path / "metrics.left_behind.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in left[:2]] == [4, 5] and left[2] == '{"step": 6, "lo'


def test_going_back_to_a_checkpoint_takes_the_later_lines_back(tmp_path):
    log = make_logger(tmp_path)
    for step in (1, 2, 3, 4):
        log.log(step, FIGURES)
    log.rewind(2)
    log.log(3, FIGURES)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_rates_count_only_the_time_and_the_tokens_of_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    log = make_logger(tmp_path)
    for step in range(1, 11):
        now[0] += 1.0
        log.step_done(step, tokens=200)
        if step == 5:  # a checkpoint of 100 s
            now[0] += 100.0
            log.throughput.restart()
    log.log(10, FIGURES)
    log.close()
    (line,) = lines(tmp_path)
    assert (line["tokens_per_second"], line["seconds_per_step"]) == (100.0, 1.0)  # 200 tokens a second on 2 ranks


def test_a_full_disk_does_not_stop_the_log(tmp_path, caplog, monkeypatch):
    log = make_logger(tmp_path)
    monkeypatch.setattr(log.writers[0], "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    log.log(1, FIGURES)
    assert "figures of step 1 were not written" in caplog.text


class FakeRun:
    id = "abc"

    def __init__(self):
        self.logged, self.metrics = [], {}

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, figures):
        self.logged.append(figures)

    def finish(self):
        pass


def test_weights_and_biases_continues_its_run_and_draws_against_our_steps(tmp_path, monkeypatch):
    given, run = [], FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **values: given.append(values) or run))
    for resumed_from in (0, 3):
        log = make_logger(tmp_path, resumed_from, enable_wandb=True)
        log.log(resumed_from + 1, FIGURES)
        log.close()
    assert [values["id"] for values in given] == [None, "abc"]
    assert [figures["step"] for figures in run.logged] == [1, 4] and run.metrics == {"step": None, "*": "step"}


def sources_of_a_rank(rank):
    progress = {"web": {"tokens": 100.0 + rank, "skipped": 1.0, "epoch": 0.2 + rank}}
    return source_figures(progress, torch.device("cpu"), dist.group.WORLD)


@pytest.mark.distributed
def test_tokens_of_sources_are_summed_and_epochs_averaged_over_ranks():
    expected = {"tokens/web": 201.0, "skipped/web": 2.0, "epoch/web": pytest.approx(0.7)}
    assert run_ranks(sources_of_a_rank, 2) == [expected, expected]


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


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H100 PCIe", 756), ("NVIDIA GB200", 2500), ("NVIDIA A100-SXM4-80GB", 312)]
)
def test_the_known_rate_of_a_device_follows_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12


def test_the_rate_follows_the_type_and_an_unknown_device_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops(torch.device("cuda"), torch.float32) == 67e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), torch.float32) == 989e12 / 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert peak_flops(torch.device("cuda")) is None


def test_traces_are_written_at_their_steps(tmp_path):
    options = Profiling(enable_profiling=True, profile_freq=3, profiler_warmup=1, profiler_active=1)
    with Profiler(options, tmp_path, rank=0, device=torch.device("cpu")) as profiler:
        for _ in range(6):
            torch.ones(2) + 1
            profiler.step()
    assert sorted(path.parent.name for path in tmp_path.rglob("rank_0.json.gz")) == ["step_3", "step_6"]
