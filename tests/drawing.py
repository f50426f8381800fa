"""Values that hypothesis draws: the same in every run, and made small where a test fails."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

# A random.Random whose every draw hypothesis makes.
RANDOM = st.randoms(use_true_random=False)

# hypothesis also draws numbers and texts that it finds in the modules loaded so far, even with derandomize. Which ones
# are loaded depends on the tests that ran before, so none of them are drawn here.
providers._get_local_constants = providers.Constants  # type: ignore[assignment]


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
