"""What eval prints beside figures that would look like a fault."""

from __future__ import annotations

from typing import Any

import pytest

from janus_cluster.cli.evaluate import _note_on_words


@pytest.mark.parametrize(
    ("unparsable", "perplexity", "is_noted"), [(25, 192.4, True), (24, 192.4, False), (25, 1.2, False)]
)
def test_words_that_were_not_learned_yet_are_expected_to_name_no_action(
    unparsable: int, perplexity: float, is_noted: bool
) -> None:
    evaluation: dict[str, Any] = {
        "generated": {"num_samples": 25, "num_unparsable": unparsable},
        "perplexity_by_segment": {"action": perplexity},
    }
    note = _note_on_words(evaluation)
    assert (note is not None) is is_noted
    assert note is None or "expected at a perplexity of 192" in note
