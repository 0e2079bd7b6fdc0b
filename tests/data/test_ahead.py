import threading
import time

import pytest

from flame.data.ahead import Ahead


def test_items_come_in_order_and_errors_where_the_item_would():
    def source():
        yield from range(5)
        raise ValueError("no sixth")

    ahead, got = Ahead(source(), depth=2), []
    with pytest.raises(ValueError, match="no sixth"):
        while True:
            got.append(next(ahead))
    assert got == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no sixth"):  # again, instead of waiting for ever
        next(ahead)


def test_a_finite_source_ends():
    assert list(Ahead(iter("abc"))) == ["a", "b", "c"]


def test_no_more_than_depth_items_are_prepared_and_stopping_ends_the_thread():
    made = []

    def source():
        while True:
            made.append(len(made))
            yield made[-1]

    ahead = Ahead(source(), depth=2)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 4  # one taken, two waiting, one in the thread's hands
    before = threading.active_count()
    ahead.stop()
    assert threading.active_count() == before - 1
