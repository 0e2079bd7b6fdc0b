"""The doctor finds every op's cases, tells right from wrong, and proves what the tables ship."""

import argparse
import os

import pytest
import torch

from flame import doctor
from flame.kernels import checking, tiles, tuning
from flame.kernels.checking import Case, Verdict, all_cases, check
from flame.kernels.isolation import run_isolated


def options(*words):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args([*words, "--device", "cpu"])


def square(error=0.0, gradient_error=0.0):
    """y = x^2 with a fast path that is off by the given relative errors."""

    def run(inputs, backend):
        x = inputs["x"]
        if backend == "reference":
            return {"y": x * x}
        wrong = x * x * (1 + gradient_error)
        return {"y": wrong + (x * x * (1 + error) - wrong).detach()}

    return Case("square", "n=8", lambda device, seed: {"x": torch.arange(1.0, 9.0, device=device)}, run)


def test_right_op_passes():
    assert check(square(), torch.device("cpu")).ok


def test_wrong_output_is_named():
    verdict = check(square(error=0.1), torch.device("cpu"))
    assert not verdict.ok and verdict.worst[0] == "y"


def test_wrong_gradient_is_named():
    verdict = check(square(gradient_error=0.1), torch.device("cpu"))
    assert not verdict.ok and verdict.worst[0] == "dx"


def test_nan_is_the_worst_error():
    assert not Verdict({"a": 1e-9, "b": float("nan")}, 1e-3).ok


def test_every_case_has_its_own_name():
    names = [(case.op, case.name) for case in all_cases()]
    assert names and len(set(names)) == len(names)


def test_every_tuned_and_every_shipped_key_is_proven_by_a_checked_case():
    proven = {(case.op, key) for case in all_cases() if not case.tune for key in case.keys}
    assert {(case.op, key) for case in all_cases() if case.tune for key in case.keys} <= proven
    for op in {case.op for case in all_cases()}:
        for gpu in ("NVIDIA H200",):
            assert {(op, key) for key in tiles.shipped_tiles(op, gpu)} <= proven


def test_command_exits_0_when_right_and_1_when_wrong(monkeypatch, capsys):
    assert doctor.main(options("--op", "linear_attention", "--case", "B=2 T=1 H=2 K=64")) == 0
    assert "right" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "all_cases", lambda ops=(): iter([square(error=0.1)]))
    assert doctor.main(options()) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_crash_is_a_verdict_not_a_traceback(monkeypatch, capsys):
    def explode(inputs, backend):
        raise RuntimeError("no kernel image")

    case = Case("square", "n=8", square().inputs, explode)
    monkeypatch.setattr(doctor, "all_cases", lambda ops=(): iter([case]))
    assert doctor.main(options()) == 1
    assert "no kernel image" in capsys.readouterr().out


@pytest.fixture
def ops(monkeypatch, tmp_path):
    """Cases found by name, tables in a folder of the test's own."""
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    found = {}
    monkeypatch.setattr(tuning, "named_cases", lambda: found)
    monkeypatch.setattr(checking, "named_cases", lambda: found)
    yield found
    tiles.shipped_tiles.cache_clear()


def test_unproven_tile_is_never_written(ops, tmp_path, capsys):
    base = square()
    tuned = Case("square", "big", base.inputs, base.run, keys={"forward": [{"BT": 16}]}, tune=True)
    tuning.tune_all([tuned], torch.device("cpu"), 1)
    assert "SKIPPED" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_tuning_takes_the_fastest_tile_whose_gradients_are_right(ops, monkeypatch):
    keys = {"forward": [{"BT": 16}, {"BT": 32}, {"BT": 64}, {"BT": 128}]}
    base = square()

    def current():
        return tiles.choose("square", "forward", {"BT": 0}, torch.device("cpu"))["BT"]

    prover = Case("square", "n=8", base.inputs, base.run, keys=keys)
    big = Case("square", "big", base.inputs, base.run, keys=keys, tune=True)
    ops.update({(case.op, case.name): case for case in (prover, big)})

    def milliseconds(case, device):
        if current() == 128:
            raise RuntimeError("out of shared memory")
        return {0: 4.0, 16: 3.0, 32: 2.0, 64: 1.0}[current()]

    right = checking.check
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(
        checking, "check", lambda case, device: Verdict({"dx": 1.0}, 1e-3) if current() == 64 else right(case, device)
    )
    tuning.tune_all([prover, big], torch.device("cpu"), 1)
    assert tiles.shipped_tiles("square", "cpu") == {"forward": {"BT": 32}}


def test_default_that_is_as_fast_needs_no_entry(ops, monkeypatch, tmp_path):
    base, keys = square(), {"forward": [{"BT": 16}]}
    prover = Case("square", "n=8", base.inputs, base.run, keys=keys)
    big = Case("square", "big", base.inputs, base.run, keys=keys, tune=True)
    ops.update({(case.op, case.name): case for case in (prover, big)})
    monkeypatch.setattr(tuning, "milliseconds", lambda case, device: 1.0)
    tuning.tune_all([prover, big], torch.device("cpu"), 1)
    assert not list(tmp_path.iterdir())


def test_several_processes_give_the_verdicts_of_one(tmp_path, capsys):
    words = ("--op", "elementwise_scan", "--case", "B=2 T=6")
    assert doctor.main(options(*words, "--json", str(tmp_path / "one.json"))) == 0
    assert doctor.main(options(*words, "--jobs", "2", "--json", str(tmp_path / "two.json"))) == 0
    one, two = ((tmp_path / f"{name}.json").read_text() for name in ("one", "two"))
    assert one == two and '"dlog_decay"' in one


def fragile(x):
    if x == 1:
        os._exit(3)
    if x == 2:
        raise ValueError("no")
    return x * x


def test_a_call_that_kills_its_process_harms_no_other():
    results = list(run_isolated(fragile, [(x,) for x in range(5)], 2))
    assert [value for done, value in results if done] == [0, 9, 16]
    assert results[1] == (False, "the process died") and results[2] == (False, "ValueError: no")
