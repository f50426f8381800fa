"""One quantity against its reference: what is measured, and how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["states", "losses", "action logits", "gradients", "gradient norms", "pixels", "exact"]

# float32: largest absolute difference (gradient norms: relative). The smallest mistakes that were ever seen are an
# order of magnitude larger (tanh-GELU 5e-4, a wrong LayerNorm epsilon 2e-3).
FLOAT32_TOLERANCES: dict[Kind, float] = {
    "states": 5e-5,
    "losses": 1e-5,
    "action logits": 1e-5,
    "gradients": 1e-5,
    "gradient norms": 1e-4,
}
# bfloat16 has 8 bits: what is compared is ‖a − b‖ / ‖b‖. Measured on these networks, then doubled: see docs/model.md.
BFLOAT16_TOLERANCES: dict[Kind, float] = {
    "states": 0.07,
    "losses": 0.05,
    "action logits": 0.2,
    "gradients": 0.16,
    "gradient norms": 0.1,
}
# One grey level: Pillow's versions round resized pixels differently.
FIXED_TOLERANCES: dict[Kind, float] = {"pixels": 1.01 / 255, "exact": 0.0}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and how the network computes."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool

    def tolerance(self, kind: Kind) -> float:
        tolerances = FLOAT32_TOLERANCES if self.dtype == torch.float32 else BFLOAT16_TOLERANCES
        return (tolerances | FIXED_TOLERANCES)[kind]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The largest difference of one quantity of one case."""

    case: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        sign = "ok  " if self.holds else "FAIL"
        return f"{sign} {self.quantity:<36} {self.difference:9.2e}  at most {self.tolerance:7.1e}  {self.case}"

    def to_json(self) -> dict[str, Any]:
        """`difference` is null where it is not finite, which JSON cannot express."""
        return {
            "case": self.case,
            "quantity": self.quantity,
            "difference": self.difference if math.isfinite(self.difference) else None,
            "tolerance": self.tolerance,
            "ok": self.holds,
        }


def compare(case: str, quantity: str, actual: Tensor, expected: Tensor, *, kind: Kind, setup: Setup) -> Comparison:
    """`actual` against `expected`: absolute in float32, relative to the whole tensor's size in bfloat16.

    Another shape, or a value that is no number, is an infinite difference.
    """
    a, b = actual.detach().double().cpu(), expected.double().cpu()
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        difference = math.inf
    elif kind == "gradient norms":
        difference = float(((a - b).abs() / b.abs().clamp(min=1e-12)).max())
    elif setup.dtype == torch.float32 or kind in FIXED_TOLERANCES:
        difference = float((a - b).abs().max()) if a.numel() else 0.0
    else:
        difference = float((a - b).norm() / b.norm().clamp(min=1e-12))
    return Comparison(case=case, quantity=quantity, difference=difference, tolerance=setup.tolerance(kind))


def count_mismatches(case: str, quantity: str, mismatches: int) -> Comparison:
    """A quantity that must be equal to the last bit."""
    return Comparison(case=case, quantity=quantity, difference=float(mismatches), tolerance=0.0)
