import math

import pytest

from flame.errors import ConfigError
from flame.optim.schedules import Schedule


def test_warmup_rises_linearly_to_the_peak():
    schedule = Schedule(total_steps=100, warmup_steps=4)
    assert [schedule.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warmup_starts_at_the_peak():
    assert Schedule(total_steps=10).factor(0) == 1.0


@pytest.mark.parametrize(
    "decay_type, middle", [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))], ids=lambda value: str(value)
)
def test_decay_passes_its_middle_and_ends_at_the_floor(decay_type, middle):
    schedule = Schedule(total_steps=20, warmup_steps=10, decay_type=decay_type, min_lr_factor=0.1)
    assert schedule.factor(10) == 1.0
    assert schedule.factor(15) == pytest.approx(0.1 + 0.9 * middle)
    assert schedule.factor(20) == schedule.factor(1000) == 0.1


def test_every_decay_falls_monotonically():
    for decay_type in ("linear", "cosine", "sqrt"):
        factors = [Schedule(50, warmup_steps=5, decay_type=decay_type).factor(step) for step in range(5, 51)]
        assert all(later < earlier for earlier, later in zip(factors, factors[1:]))
        assert factors[-1] == 0.0 < factors[-2]  # the last update of the run still learns


def test_decay_ratio_leaves_a_stable_part():
    schedule = Schedule(total_steps=100, warmup_steps=10, decay_ratio=0.2)
    assert {schedule.factor(step) for step in range(9, 81)} == {1.0}
    assert schedule.factor(90) == pytest.approx(0.5)


def test_zero_decay_ratio_never_decays():
    schedule = Schedule(total_steps=10, decay_ratio=0.0)
    assert {schedule.factor(step) for step in range(10)} == {1.0}


def test_table_holds_the_factor_of_every_update_and_the_floor():
    schedule = Schedule(total_steps=12, warmup_steps=3, decay_type="cosine", min_lr_factor=0.2)
    assert schedule.table().tolist() == pytest.approx([schedule.factor(step) for step in range(13)])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"decay_type": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": 60, "decay_ratio": 0.5}, "do not fit into 100 steps"),
        ({"decay_ratio": 1.5}, "between 0 and 1"),
        ({"min_lr_factor": -0.1}, "between 0 and 1"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_impossible_schedules_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        Schedule(total_steps=100, **options)
