"""Which environment variables hold secrets: their values are never in a rendered file."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """True for WANDB_API_KEY, HF_TOKEN, *_TOKEN, *_KEY, *_SECRET, *_PASSWORD."""
    return _SECRET.search(name) is not None
