"""verify-core: the proof that this installation computes JanusVLN, run by the training room's own Python module."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from janus_cluster.errors import UsageError
from janus_cluster.job.resources import vectors_dir

MODULE = "janus_cluster.janusvln.verify.command"


@click.command(
    "verify-core",
    epilog="""\b
Examples:
  janus-cluster verify-core                                  those of a checkout, float32, CPU
  janus-cluster verify-core --device cuda --dtype bfloat16   on this GPU, as training computes
  janus-cluster verify-core vectors/ --json                  a folder of your own

\b
Exit codes: 0 all quantities hold, 1 one does not, 2 no vectors there or wrong input.

\b
See also: docs/model.md
""",
)
@click.argument("folder", required=False, metavar="[DIR]")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where it computes."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 as training computes, with a wider tolerance.",
)
@click.option("--compile", "compiled", is_flag=True, help="With torch.compile on every transformer block.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every quantity and nothing else.")
def verify_core(folder: str | None, device: str, dtype: str, compiled: bool, as_json: bool) -> NoReturn:
    """Recompute reference numbers (DIR, or the checkout's) with the training code; print the largest differences."""
    if folder is None:
        vectors_dir()
    elif not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder", hint="without DIR it takes the vectors of the checkout")
    if importlib.util.find_spec("torch") is None:
        raise UsageError("torch is not installed for this Python", hint="pip install 'janus-cluster[train]'")
    command = [sys.executable, "-m", MODULE, "--device", device, "--dtype", dtype]
    command += ["--compile"] * compiled + ["--json"] * as_json
    if folder is not None:
        command += ["--", folder]
    sys.stdout.flush()
    os.execv(sys.executable, command)
