"""Values that hypothesis draws: the same in every run, and made small where a test fails."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# A random.Random whose every draw hypothesis makes.
RANDOM = st.randoms(use_true_random=False)


def drawn(examples: int) -> settings:
    """So many examples, however long one takes; nothing is kept between runs."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
