"""How well a policy navigates: success rate, SPL and the like over many episodes, each with a confidence interval.

Pure functions of numbers: no torch, no disk. Source of the measures: Anderson et al., arXiv 1807.06757.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from janus_cluster.run.records.training import Measure, NavigationScores, Outcome

_Z_95 = 1.959964


def score_navigation(outcomes: Sequence[Outcome]) -> NavigationScores:
    """Raises: ValueError without an episode."""
    if not outcomes:
        raise ValueError("no episode was walked")
    return NavigationScores(
        num_episodes=len(outcomes),
        success_rate=measure_rate([o.is_success for o in outcomes]),
        spl=measure_mean([o.spl for o in outcomes], highest=1.0),
        oracle_success_rate=measure_rate([o.was_there for o in outcomes]),
        navigation_error_m=measure_mean([o.error_m for o in outcomes]),
        path_m=measure_mean([o.path_m for o in outcomes]),
        steps=measure_mean([float(o.steps) for o in outcomes]),
        num_never_stopped=sum(not o.has_stopped for o in outcomes),
    )


def measure_rate(hits: Sequence[bool]) -> Measure:
    """The share of hits with Wilson's interval, which is right for few episodes and for shares near 0 and 1 too."""
    n, share = len(hits), sum(hits) / len(hits)
    spread = 1 + _Z_95**2 / n
    middle = (share + _Z_95**2 / (2 * n)) / spread
    half = _Z_95 / spread * math.sqrt(share * (1 - share) / n + _Z_95**2 / (4 * n**2))
    return Measure(mean=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


def measure_mean(values: Sequence[float], *, highest: float = math.inf) -> Measure:
    """The mean of values from 0 to `highest`, with the normal interval of its standard error."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Measure(mean=mean, low=None, high=None)
    half = _Z_95 * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Measure(mean=mean, low=max(0.0, mean - half), high=min(highest, mean + half))
