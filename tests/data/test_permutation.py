"""Permutations are permutations, differ by key, and look random."""

import numpy as np
import pytest

from flame.data.permutation import Permutation, combine, hash_text, mix64, mix64_array


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100, 1000, 4097])
def test_permutation_is_a_bijection(size):
    assert sorted(map(Permutation(size, 5), range(size))) == list(range(size))


def test_keys_give_unrelated_permutations():
    orders = [np.array(list(map(Permutation(5000, key), range(5000)))) for key in range(4)]
    for index, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(5000))[0, 1]) < 0.06
        for other in orders[:index]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
            assert (one == other).sum() < 10


def test_hash_of_arrays_equals_hash_of_numbers():
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert mix64_array(values).tolist() == [mix64(int(value)) for value in values]


def test_hashes_do_not_change_between_versions():
    assert (mix64(1), hash_text("flame"), combine(1, 2)) == (
        10451216379200822465,
        1442154933010231427,
        15671754871817308195,
    )
