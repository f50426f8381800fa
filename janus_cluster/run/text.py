"""Sanitise log text: strip escape sequences, redact the run's secrets."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from janus_cluster.run.paths import RunDir

# CSI, OSC and the other string sequences (DCS, SOS, PM, APC; in their 8-bit forms too), and two-letter ones.
_ESCAPE_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
# C0 but for the tab, DEL and C1; and bidirectional controls, with which a line looks other than it is.
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL = dict.fromkeys((*range(9), *range(10, 32), *range(127, 160), *_BIDI, 0x2028, 0x2029))
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# json escapes C0 already.
_NOT_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Shorter values would be found by accident.
_SHORTEST_SECRET = 6


def counted(number: float, noun: str) -> str:
    """ "1 rank", "2 ranks", "0.5 epochs"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number if isinstance(number, int) else format(number, 'g')} {noun if number == 1 else plural}"


def clean(text: str) -> str:
    """The text without colours and control characters, which could move the reader's cursor or retitle the window."""
    # Nothing that is taken out is printable: most lines of a log need no more than this.
    if text.isprintable():
        return text
    return _SURROGATE.sub("\ufffd", _ESCAPE_SEQUENCE.sub("", text).translate(_CONTROL))


def clean_line(text: str) -> str:
    """`clean` for a text that must stay on one line: line breaks become spaces."""
    return clean(re.sub(r"[\r\n]+", " ", text)).strip()


def to_json(value: Any) -> str:
    """Indented JSON in which every character that a terminal would act on is escaped."""
    # Where stdout cannot take all characters, a `?` in a path would be another path.
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=not is_utf8)
    return _NOT_IN_JSON.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _without_nan(value: Any) -> Any:
    """The value with null for every number that JSON cannot express: the loss of a run that diverged."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def load_secrets(run: RunDir) -> dict[str, str]:
    """The secrets of all bundles that this user may read; a text that is shown goes through `redact` with them."""
    found: dict[str, str] = {}
    for path in (run.bundle(number).secrets_env for number in run.bundle_numbers()):
        if not path.exists():
            continue
        # Imported here, because the job file's schema comes with it and most runs have no secrets.
        from janus_cluster.job.env import parse_secrets_env

        with contextlib.suppress(OSError, ValueError):
            found |= parse_secrets_env(path.read_text(encoding="utf-8"))
    return found


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """The text with <NAME> in the place of each secret's value."""
    for name, value in secrets.items():
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"<{name}>")
    return text
