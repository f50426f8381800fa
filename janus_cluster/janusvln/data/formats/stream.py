"""The records of a file one after the other, so that a file of any size needs the memory of a few records.

The standard library's parser reads each record, since records hold what stricter ones refuse (NaN and Infinity, as
`json.dump` writes them).
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from janus_cluster.janusvln.data.formats.source import BadUnitError

CHUNK_BYTES = 1 << 20
# An error this near to the end of what was read may be a word, a number or an escape that was cut there.
CUT_CHARS = 16
LIST_KEY = "episodes"
_SPACES = " \t\r\n"
_DECODER = json.JSONDecoder()


class BrokenLine(NamedTuple):
    """A line of a .jsonl file that is no JSON."""

    reason: str


class RecordStream:
    """Iterates over (number, record as parsed) of a .json list or a .jsonl file, gzipped or not.

    Of a .jsonl file a line that is no JSON is a BrokenLine. Raises: BadUnitError while it is iterated over, where the
    file cannot be read to its end or holds no list of records.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._size = 0

    def share_read(self) -> float:
        """How much of the file has been read, 0 to 1."""
        if self._file is None or self._file.closed:
            return 1.0 if self._size else 0.0
        return min(1.0, self._file.tell() / max(1, self._size))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        try:
            with self._path.open("rb") as file:
                self._file, self._size = file, max(1, self._path.stat().st_size)
                plain: Any = gzip.GzipFile(fileobj=file) if self._path.suffix == ".gz" else file
                yield from _lines(plain) if ".jsonl" in self._path.suffixes else enumerate(_records(plain))
        except FileNotFoundError as error:
            raise BadUnitError("is missing") from error
        except (OSError, EOFError, zlib.error) as error:
            raise BadUnitError(f"cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            raise BadUnitError(f"cannot be read as JSON ({error})") from error


def _lines(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Lines that are not empty, each parsed separately."""
    found = False
    for number, line in enumerate(file):
        if line.strip():
            found = True
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield number, BrokenLine(f"cannot be read as JSON ({error})")
    if not found:
        raise BadUnitError("holds no line")


def _records(file: IO[bytes]) -> Iterator[Any]:
    """The elements of the list, or of the list under "episodes" of an object."""
    text = _Text(file)
    if text.peek() == "[":
        yield from text.elements()
    elif text.peek() == "{":
        found = False
        for name in text.names():
            if name == LIST_KEY and text.peek() == "[":
                found = True
                yield from text.elements()
            else:
                text.value()
        if not found:
            raise BadUnitError("holds a dict, expected a list of records")
    else:
        raise BadUnitError(f"holds a {type(text.value()).__name__}, expected a list of records")
    if text.peek():
        raise text.error("something follows the end")


class _Text:
    """A text that is read as far as the next value needs it. `_done` characters were taken and forgotten."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer = ""
        self._at = 0
        self._done = 0
        self._ended = False

    def error(self, what: str) -> ValueError:
        """An error with its position."""
        return ValueError(f"{what}: character {self._done + self._at}")

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACES:
                self._at += 1
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._read_more()

    def take(self, wanted: str) -> str:
        """The next character, which must be one of these."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.error(f"expected {' or '.join(wanted)}, found {found or 'the end'}")
        self._at += 1
        return found

    def elements(self) -> Iterator[Any]:
        """Each value of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def names(self) -> Iterator[str]:
        """Each name of the object that begins here; the caller takes the value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.error("expected a name")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._buffer) - CUT_CHARS or error.msg.startswith("Unterminated")
                if self._ended or not cut:
                    raise ValueError(f"{error.msg}: character {self._done + error.pos}") from error
            else:
                # A number near the end of what was read may go on: of 1.5e-3 the beginnings 1, 1.5 are numbers too.
                if isinstance(value, (str, list, dict)) or end < len(self._buffer) - CUT_CHARS or self._ended:
                    self._at = end
                    return value
            self._read_more()

    def _read_more(self) -> None:
        # What is kept doubles at least: a record of many megabytes is not parsed once for each of them.
        data = self._file.read(max(CHUNK_BYTES, len(self._buffer) - self._at))
        self._done += self._at
        self._ended = not data
        self._buffer = self._buffer[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
