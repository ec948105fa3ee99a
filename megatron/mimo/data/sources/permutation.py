"""Pseudo-random numbers and permutations as functions of a seed, without any memory."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Permutation", "random_fraction", "random_int"]

_MASK = (1 << 64) - 1
_ROUNDS = 6


def random_int(*key: int) -> int:
    """A number below 2**64, the same for the same key (splitmix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for one in key:
        state = (state ^ (one & _MASK)) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def random_fraction(*key: int) -> float:
    """A number from 0, below 1."""
    return (random_int(*key) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Permutation:
    """A permutation of the numbers below ``size``, by a Feistel network with cycle walking.

    Attributes:
        size: at least 1.
        seed: of the permutation.
        epoch: another order in each.
    """

    size: int
    seed: int
    epoch: int

    def __getitem__(self, place: int) -> int:
        """Which number stands at a place, from 0."""
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        while True:
            left, right = place >> half, place & mask
            for turn in range(_ROUNDS):
                mixed = random_int(self.seed, self.epoch, turn, right) & mask
                left, right = right, left ^ mixed
            place = left << half | right
            if place < self.size:
                return place
