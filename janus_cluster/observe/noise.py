"""Lines to be left out or shortened: progress bars, libraries' notes on themselves, our own steps."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["step", "bar", "chatter"]

# The step lines of training/metrics.py; the progress line shows the same.
_STEP = re.compile(r"step \d+/\d+ loss ")
# tqdm: `Loading shards:  25%|██▌  | 1/4 [00:01<00:05, 1.90s/it]`, and `12it [00:03, 3.90it/s]` without a total.
_BAR = re.compile(
    r"(?P<what>.*?):? *(?:(?P<percent>\d{1,3})%\|.*\| *\S+/\S+ \[[\d:]+<|\d[\d.]*[kMGT]?(?:it|B) \[[\d:]+, .*/s\])"
)
# DeepSpeed's logger, and what NCCL_DEBUG=INFO makes NCCL write: thousands of lines, and 16 times over on two nodes.
# c10d's note on a peer's address without a name is one a connection, and means nothing: addresses are what it uses.
_CHATTER = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[(?:INFO|DEBUG)\] \["
    r"|\S+:\d+:\d+ \[\d+\] NCCL (?:INFO|TRACE) "
    r"|(?:\[rank\d+\]:)?\[W\d+ [\d:.]+ socket\.cpp:\d+\] \[c10d\] The hostname of the client socket cannot be retrieved"
)


def classify(text: str) -> Kind | None:
    """The kind of noise of the line; None for one that is to be read."""
    if text.startswith("step ") and _STEP.match(text):
        return "step"
    if ("%|" in text or "/s]" in text) and _BAR.match(text):
        return "bar"
    if text and (text[0] == "[" or " NCCL " in text) and _CHATTER.match(text):
        return "chatter"
    return None


def shorten_bar(text: str) -> str:
    """`Loading shards 25%` of a progress bar; the bar without a total as it is."""
    found = _BAR.match(text)
    if found is None or found["percent"] is None:
        return text.strip()
    return f"{found['what'].strip()} {found['percent']}%".strip()
