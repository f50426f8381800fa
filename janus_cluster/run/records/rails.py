"""Tests of rails: pairs of nodes over one rail each, and what they show of every node's end of it.

A pair is as fast as the slower of its two ends. So an end is sound once it was fast with any partner, and bad once it
was slow with a sound one. Two nodes are one pair, and a slow pair does not show which end is slow.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from janus_cluster.run.records.base import Record

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class RailTest(Record):
    """One pair of nodes over one rail. `together`: while the pair's other rails carried data, too.

    Units: seconds per all-reduce of `payload_bytes` over two ranks, each as long as its slower end.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    rail: str
    nodes: tuple[str, ...]
    together: bool
    payload_bytes: int
    times_s: tuple[float, ...]
    sum_correct: bool = True
    error: str | None = None

    @property
    def pair(self) -> Pair:
        return self.nodes[0], self.nodes[1]

    @property
    def is_broken(self) -> bool:
        """Nothing arrived, or not what was sent: no rate, however long one would wait."""
        return self.error is not None or not self.sum_correct or not self.times_s

    def rate_gb_per_s(self, statistic: str) -> float:
        """The rate by the median of the iterations, or by the `best` of them; 0 where it is broken.

        At two ranks bus bandwidth and algorithm bandwidth are the same.
        """
        if self.is_broken:
            return 0.0
        one_of = min if statistic == "best" else statistics.median
        return self.payload_bytes / one_of(self.times_s) / 1e9


@dataclass(frozen=True)
class Ends:
    """What the tests of one rail show of its ends: node by node, and the pairs in which no end is known."""

    sound: frozenset[str]
    bad: frozenset[str]
    undecided: tuple[Pair, ...]


def attribute_ends(slow_pairs: Iterable[Pair], fast_pairs: Iterable[Pair]) -> Ends:
    """Which ends are sound, which are bad, and which slow pairs leave open which end is bad."""
    slow = list(dict.fromkeys(slow_pairs))
    sound = frozenset(node for pair in fast_pairs for node in pair)
    bad = frozenset(a for pair in slow for a, b in (pair, pair[::-1]) if a not in sound and b in sound)
    return Ends(sound, bad, tuple(pair for pair in slow if not (sound | bad) & set(pair)))


class PairPlan:
    """Which pairs to test next, for one rail or for all at once: rounds in which no node is in two pairs.

    Sound nodes need one round, two where their number is odd. A node of a slow pair is tested again, with a sound
    partner as soon as one is known: `repeats` times, because machines are noisy, and until it is attributed. That takes
    a number of rounds that grows with the logarithm of the number of nodes at most.
    """

    def __init__(self, nodes: Sequence[str], *, repeats: int) -> None:
        self.nodes = tuple(nodes)
        self.repeats = repeats
        self._slow: list[Pair] = []
        self._fast: list[Pair] = []
        self._broken: set[str] = set()
        self._rounds = 0
        self._most_rounds = 1 + len(self.nodes) % 2 + repeats + (len(self.nodes) - 1).bit_length()

    def note(self, pair: Pair, *, is_slow: bool, is_broken: bool = False) -> None:
        """The pair was tested."""
        (self._slow if is_slow else self._fast).append(pair)
        if is_broken:
            self._broken.update(pair)

    def next_round(self) -> list[Pair]:
        """The pairs of the next round; empty when there is nothing more to learn."""
        if self._rounds >= self._most_rounds:
            return []
        pairs = self._untested() or self._retest()
        self._rounds += 1
        return pairs

    def _untested(self) -> list[Pair]:
        """Every node with the one half the list away; the last of an odd number with the first.

        Slurm lists nodes by topology: half the list away is seldom on the same leaf switch.
        """
        tested = {node for pair in (*self._slow, *self._fast) for node in pair}
        left = [node for node in self.nodes if node not in tested]
        half = len(left) // 2
        if half:
            return list(zip(left[:half], left[half : 2 * half], strict=True))
        if left and len(self.nodes) > 1:
            return [(left[0], self.nodes[0])]
        # Of three nodes these were two pairs with one node in both: only the third pair separates it from the others.
        is_third_missing = len(self.nodes) == 3 and self._rounds == 2
        return [(self.nodes[1], self.nodes[2])] if is_third_missing else []

    def _retest(self) -> list[Pair]:
        ends = attribute_ends(self._slow, self._fast)
        counts = Counter(node for pair in self._slow for node in pair)
        suspects = [n for n in self.nodes if n in counts and n not in ends.sound and self._is_open(n, ends, counts)]
        sound = [n for n in self.nodes if n in ends.sound]
        if sound:
            # Another partner each time, so that what one of them does beside it is not taken for the suspect's fault.
            first = self._rounds % len(sound)
            return [(s, partner) for s, partner in zip(suspects, sound[first:] + sound[:first], strict=False)]
        return self._among(suspects, counts)

    def _is_open(self, node: str, ends: Ends, counts: Mapping[str, int]) -> bool:
        """Whether one more test of a node that was never fast can settle anything."""
        needed = 1 if node in self._broken else 1 + self.repeats
        return counts[node] < needed or (node not in ends.bad and len(self.nodes) > 2)

    def _among(self, suspects: Sequence[str], counts: Mapping[str, int]) -> list[Pair]:
        """Pairs among nodes of which none is known to be sound: those that were not tested yet first."""
        tested = Counter(frozenset(pair) for pair in self._slow)
        pairs: list[Pair] = []
        left = list(suspects)
        while len(left) > 1:
            node = left.pop(0)
            partner = min(left, key=lambda other: tested[frozenset((node, other))])
            left.remove(partner)
            pairs.append((node, partner))
        is_new = any(not tested[frozenset(pair)] for pair in pairs)
        return pairs if is_new or any(counts[n] < 1 + self.repeats and n not in self._broken for n in suspects) else []


def best_rates(tests: Iterable[RailTest], *, statistic: str) -> dict[tuple[str, str], float]:
    """(node, rail) → GB/s of its best pair: the others may have been slowed by the other end."""
    best: dict[tuple[str, str], float] = {}
    for test in tests:
        rate = test.rate_gb_per_s(statistic)
        for node in test.nodes:
            best[node, test.rail] = max(rate, best.get((node, test.rail), 0.0))
    return best


def median_of_others(test: RailTest, best: Mapping[tuple[str, str], float]) -> float | None:
    """The median of the ends that took no part in this test; None where there are none, or none of them works."""
    others = [rate for (node, rail), rate in best.items() if rate and not (rail == test.rail and node in test.nodes)]
    return statistics.median(others) if others else None


def without_doubles(tests: Iterable[RailTest]) -> list[RailTest]:
    """Both nodes of a pair report its test; each counts once."""
    return list(dict.fromkeys(tests))
