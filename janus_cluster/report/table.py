"""A table of numbers that grows row by row and never takes more than a fixed room."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping

# 20,000 steps with 60 columns take 10 MB; a picture is 1,200 pixels wide.
MAX_ROWS = 20_000
# 16 ranks × 3 values and the 20 of a step; a damaged file must not make columns without end.
MAX_COLUMNS = 400


def number(value: object) -> float:
    """The value as a float; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


class Table:
    """Columns of equal length; NaN where a row did not name a column.

    Past `max_rows` every second row is dropped and, from then on, only every second, fourth, … row is kept.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._columns: dict[str, array[float]] = {}
        self._stride = 1
        self._num_seen = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    @property
    def stride(self) -> int:
        """Of how many rows one was kept."""
        return self._stride

    def add(self, row: Mapping[str, float]) -> None:
        """The row is the last one, unless the table is thinned and it is not its turn."""
        self._num_seen += 1
        if (self._num_seen - 1) % self._stride:
            return
        for name in row:
            if name not in self._columns and len(self._columns) < MAX_COLUMNS:
                self._columns[name] = array("d", [math.nan]) * self._length
        for name, column in self._columns.items():
            column.append(row.get(name, math.nan))
        self._length += 1
        if self._length > self._max_rows:
            self._columns = {name: column[::2] for name, column in self._columns.items()}
            self._length = (self._length + 1) // 2
            self._stride *= 2

    def column(self, name: str) -> array[float]:
        """The column's values, a row each."""
        found = self._columns.get(name)
        return array("d", [math.nan]) * self._length if found is None else found

    def has(self, name: str) -> bool:
        """True if the column holds at least one finite value."""
        return any(map(math.isfinite, self._columns.get(name, ())))


def finite(values: Iterable[float]) -> list[float]:
    """The values without NaN and infinities."""
    return [v for v in values if math.isfinite(v)]
