"""Names of nodes as people read them: two in full, more as Slurm writes them; and their endpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FEW = 2
_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)


def fold_nodes(nodes: Sequence[str]) -> str:
    """`h800-01, h800-02`; of more than two `h800-[01-04,07], login`. Lists joined by commas count as their names."""
    names = list(dict.fromkeys(name for text in nodes for name in text.split(",")))
    if len(names) <= _FEW:
        return ", ".join(nodes)
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        stem, number = found.groups() if found else (name, "")
        groups.setdefault((stem, len(number)), []).append(number)
    return ", ".join(_fold(stem, numbers) for (stem, _), numbers in groups.items())


def join_endpoint(address: str, port: int) -> str:
    """`host:port`; an IPv6 address is in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _fold(stem: str, numbers: Sequence[str]) -> str:
    if len(numbers) == 1:
        return stem + numbers[0]
    runs: list[list[str]] = []
    for number in sorted(numbers):
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"{stem}[{','.join(run[0] if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}]"
