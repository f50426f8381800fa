"""What hypothesis draws does not depend on which tests ran before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
DRAW = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from hypothesis import given, strategies as st
from tests.drawing import RANDOM, drawn

@drawn(300)
@given(st.integers(), st.text(), RANDOM)
def draw(number, text, rng):
    print(number, ascii(text), rng.randrange(10**9))

draw()
"""


def test_the_same_values_are_drawn_whichever_modules_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "loaded_before.py").write_text(f"VALUES = {list(range(10_000, 10_300))}, 'a text', 'another'\n")

    def draw(*modules: str) -> str:
        script = tmp_path / "draw.py"
        script.write_text(DRAW)
        command = [sys.executable, "-B", script, *modules]
        done = subprocess.run(
            command, env={"PYTHONPATH": f"{REPO}:{tmp_path}"}, text=True, capture_output=True, check=True
        )
        return done.stdout

    alone = draw()
    assert len(set(alone.splitlines())) > 200
    assert draw("loaded_before") == alone
