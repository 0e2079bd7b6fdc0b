"""Pseudorandom permutations of [0, n) evaluated one index at a time, and the hashes they are made of.

A shuffle that is a function of the index needs no buffer and no state: an epoch's order is known from its key.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def mix64(value: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers with good avalanche."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix64_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix64` of every element."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_text(text: str) -> int:
    """A 64-bit hash that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def combine(*parts: int) -> int:
    """One 64-bit key from several integers; the order matters."""
    key = 0
    for part in parts:
        key = mix64(key ^ mix64(part & _MASK))
    return key


class Permutation:
    """A permutation of [0, size) chosen by a 64-bit key, computed in O(1) an index.

    An alternating Feistel network on Z_a x Z_b with a*b just above `size` (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002); the few values past `size` are walked until they fall inside.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._left = max(1, math.isqrt(max(size - 1, 0)) + 1)
        self._right = max(1, -(-size // self._left))
        self._keys = [combine(key, index) for index in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        index = self._round_trip(index)
        while index >= self.size:
            index = self._round_trip(index)
        return index

    def _round_trip(self, index: int) -> int:
        left, right = divmod(index, self._right)
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + mix64(left ^ key)) % self._right
            else:
                left = (left + mix64(right ^ key)) % self._left
        return left * self._right + right
