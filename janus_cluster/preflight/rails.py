"""Judge the rails: which end of which rail is slow, as far as the tested pairs show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from janus_cluster.preflight.bandwidth import CounterDeltas
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.rate import Limit, baseline_limits, judge_rate, profile_limits
from janus_cluster.run.records.rails import Pair, RailTest, attribute_ends, best_rates, median_of_others
from janus_cluster.run.records.verdict import CheckResult


def judge_rails(
    tests: Sequence[RailTest],
    profile: Mapping[str, Any],
    *,
    nodes: Sequence[str],
    deltas: CounterDeltas,
    evidence: str,
) -> list[CheckResult]:
    """Every rail alone and all at once, against the floor and against the median of the other ends.

    A slow rail is of the node that was slow with a sound partner. Where no partner is known to be sound, as with two
    nodes, it is of the pair, unless the error counters rose at one end only. `evidence`: other measurements
    of the hosts, shown where the slow end cannot be determined.
    """
    if not tests:
        why = "one node" if len(nodes) < 2 else "the nodes share no network (simulated nodes on one machine?)"
        check = Check(id="rails", node=",".join(nodes), expected="a pair per rail", source="probe", phase="active")
        return [check.judged("SKIP", f"no rail to test: {why}")]
    results = []
    for rail in dict.fromkeys(test.rail for test in tests):
        for together in (False, True):
            results += _Rail(rail, together, tests, profile).results(nodes, deltas, evidence)
    return results


class _Rail:
    """The tests of one rail, alone or with all the others at once."""

    def __init__(self, rail: str, together: bool, tests: Sequence[RailTest], profile: Mapping[str, Any]) -> None:
        row = profile["rails"]
        self.rail = rail
        self.together = together
        self.id = f"{'rails_together' if together else 'rail'}.{rail}"
        self.statistic = str(row["statistic"])
        alike = [test for test in tests if test.together == together]
        self.tests = [test for test in alike if test.rail == rail]
        self._best = best_rates(alike, statistic=self.statistic)
        floor, self._share = (
            (row["together_gb_per_s"], row.get("of_median_together"))
            if together
            else (row["busbw_gb_per_s"], row.get("of_median"))
        )
        self._limits = [*profile_limits(floor), *baseline_limits(profile, self.id)]

    def results(self, nodes: Sequence[str], deltas: CounterDeltas, evidence: str) -> list[CheckResult]:
        """One for each bad node, one for each slow pair without a known bad end, one for all the rest."""
        slow = [test for test in self.tests if self._is_slow(test)]
        ends = attribute_ends((t.pair for t in slow), (t.pair for t in self.tests if t not in slow))
        found = []
        for node in (n for n in nodes if n in ends.bad):
            own = [test for test in slow if node in test.nodes and ends.sound & set(test.nodes)]
            partners = ", ".join(dict.fromkeys(n for test in own for n in test.nodes if n != node))
            why = f"slow with {partners}, with whom others are fast"
            found.append(self._judge(own, node, f"{why}. {_compare(self.rail, [node])}"))
        for pair in ends.undecided:
            node, why = attribute(self.rail, pair, deltas, evidence)
            own = [test for test in slow if test.pair == pair]
            found.append(self._judge(own, node, f"{why}. {_compare(self.rail, pair)}; swap one end"))
        rest = [node for node in nodes if node in ends.sound]
        if rest:
            best_of = [self._fastest(t for t in self.tests if node in t.nodes) for node in rest]
            worst = min(best_of, key=self._rate)
            pairs = len({test.pair for test in self.tests})
            fix = _compare(self.rail, worst.nodes)
            found.append(self._judge([worst], ",".join(rest), fix, of=pairs))
        known = ends.sound | ends.bad | {node for pair in ends.undecided for node in pair}
        return [*found, *self._unknown([node for node in nodes if node not in known])]

    def _unknown(self, nodes: Sequence[str]) -> list[CheckResult]:
        """ERROR for nodes that no sound partner tested. All at once a rail that carries nothing is not tested again."""
        tested = {node for test in self.tests for node in test.nodes}
        left = [node for node in nodes if not self.together or node in tested]
        check = Check(
            id=self.id, node=",".join(left), expected="tested with a sound partner", source="probe", phase="active"
        )
        return [check.judged("ERROR", "not tested", fix="see the node logs of this attempt")] if left else []

    def _rate(self, test: RailTest) -> float:
        return test.rate_gb_per_s(self.statistic)

    def _fastest(self, tests: Iterable[RailTest]) -> RailTest:
        return max(tests, key=self._rate)

    def _limits_of(self, test: RailTest) -> list[Limit]:
        median = median_of_others(test, self._best)
        if not self._share or median is None:
            return self._limits
        share = self._share["fail_below"]
        source = f"{share:g} × the median of the other rails ({median:.3g}): {self._share['source']}"
        return [*self._limits, Limit(share * median, "FAIL", source)]

    def _is_slow(self, test: RailTest) -> bool:
        return test.is_broken or any(
            self._rate(test) < limit.value for limit in self._limits_of(test) if limit.state == "FAIL"
        )

    def _judge(self, tests: Sequence[RailTest], node: str, fix: str, *, of: int = 1) -> CheckResult:
        """The better of the tests counts: who was slow was tested again."""
        test = self._fastest(tests)
        if test.is_broken:
            check = Check(id=self.id, node=node, expected="data arrives", source="probe", phase="active")
            return check.judged("FAIL", test.error or "the sum was wrong", fix=fix)
        times = "repeated, " if len(tests) > 1 else ""
        slowest = f"slowest of {of} pairs, " if of > 1 else ""
        detail = f"{slowest}{self.statistic}, {times}{test.payload_bytes / 1e6:g} MB, {' and '.join(test.nodes)}"
        limits = self._limits_of(test)
        return judge_rate(self._rate(test), limits, id=self.id, node=node, unit="GB/s", detail=detail, fix=fix)


def _compare(rail: str, nodes: Sequence[str]) -> str:
    return f"Compare cable, port rate and PCIe width of {rail} on {' and '.join(nodes)}"


def attribute(rail: str, nodes: Pair, deltas: CounterDeltas, evidence: str) -> tuple[str, str]:
    """(the node of the pair to blame for a slow rail, or both joined by a comma; the reason)."""
    rose = {node: _count_errors(deltas.get(node, {}), rail) for node in nodes}
    guilty = [node for node, count in rose.items() if count > 0]
    counts = ", ".join(f"{node} +{count}" for node, count in rose.items())
    if len(guilty) == 1:
        return guilty[0], f"error counters rose at one end only ({counts})"
    more = f"; {evidence}" if evidence else ""
    return ",".join(nodes), f"which end is slow cannot be determined: error counters {counts}{more}"


def _count_errors(deltas: Mapping[str, Mapping[str, int]], rail: str) -> int:
    """Errors of the rail's own port; where the rail is a GPU and NCCL chose the port, of all HCA ports (mlx5_0:1).

    Without HCAs: of all interfaces. Beside HCAs these are not counted: IPoIB drops packets on sound nodes.
    """
    of_hcas = [counters for port, counters in deltas.items() if ":" in port]
    ports = [deltas[rail]] if rail in deltas else of_hcas or list(deltas.values())
    return sum(sum(counters.values()) for counters in ports)
