"""Which test files `-m` leaves out as a whole: those are not imported, so the fast tests need no torch.

A file is left out only where its own `pytestmark` makes `-m` false for every test that it could hold. Any other file is
imported, and a missing torch is an error there: what is selected cannot be lost.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Set
from pathlib import Path

from _pytest.mark.expression import Expression


def find_marks(path: Path) -> set[str]:
    """The plain marks of `pytestmark = pytest.mark.x` or of its list, read without an import."""
    values = [
        node.value
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["pytestmark"]
    ]
    written = [e for v in values for e in (v.elts if isinstance(v, (ast.List, ast.Tuple)) else [v])]
    return {e.attr for e in written if isinstance(e, ast.Attribute) and ast.unparse(e.value) == "pytest.mark"}


def selects_nothing(expression: str, marks: Set[str]) -> bool:
    """True where `-m expression` is false for a test with `marks`, whatever other marks it has."""
    if not expression or not marks:
        return False
    compiled = Expression.compile(expression)
    others = sorted({*re.findall(r"\w+", expression)} - marks - {"and", "or", "not"})
    subsets = itertools.chain.from_iterable(itertools.combinations(others, n) for n in range(len(others) + 1))
    return not any(compiled.evaluate(lambda name, held=marks | {*s}, **_: name in held) for s in subsets)
