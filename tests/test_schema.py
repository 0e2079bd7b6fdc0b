from dataclasses import dataclass, field
from typing import Literal

import pytest

from flame.errors import ConfigError
from flame.schema import build


@dataclass
class Inner:
    width: int = 4


@dataclass
class Outer:
    rate: float
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    inner: Inner | None = None
    layers: list[int] = field(default_factory=list)


def test_values_of_the_declared_type_are_kept_and_ints_widen_to_float():
    built = build(Outer, {"rate": 1, "limit": 3, "inner": {"width": 2}, "layers": [1, 2]})
    assert built == Outer(rate=1.0, limit=3, inner=Inner(2), layers=[1, 2])
    assert isinstance(built.rate, float)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"rate": 1.0, "kidn": "a"}, ["kidn", "did you mean 'kind'"]),
        ({"rate": "fast"}, ["rate", "'fast'", "a number"]),
        ({"rate": True}, ["rate", "a number"]),
        ({"rate": 1.0, "kind": "c"}, ["kind", "'a', 'b'"]),
        ({"rate": 1.0, "limit": True}, ["limit", "whole number"]),
        ({"rate": 1.0, "inner": {"widht": 1}}, ["inner", "did you mean 'width'"]),
        ({"rate": 1.0, "layers": [1, "x"]}, ["layers[1]"]),
        ({}, ["rate", "required"]),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_would_be_accepted(values, words):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values, "job")
    for word in words:
        assert word in str(caught.value)
