"""The rendered configurations against DeepSpeed itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.job import deepspeed as rendering
from janus_cluster.job.resolved import ResolvedJob

pytestmark = pytest.mark.train

# A fresh interpreter: importing DeepSpeed warns about its surroundings, which pytest would make errors of.
_VALIDATE = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
given = json.load(open(sys.argv[1]))
DeepSpeedZeroConfig(strict=True, **given["zero_optimization"])
# DeepSpeed checks the batch arithmetic for the ranks that there are: here one.
one_rank = given["train_micro_batch_size_per_gpu"] * given["gradient_accumulation_steps"]
config = DeepSpeedConfig(given | {"train_batch_size": one_rank})
stage, bf16 = int(config.zero_optimization_stage), config.bfloat16_config.enabled
print(json.dumps({"stage": stage, "bf16": bf16, "clip": config.gradient_clipping}))
"""
_FIELDS = """
import json
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as C
deprecated = {n for n, f in C.model_fields.items() if (f.json_schema_extra or {}).get("deprecated")}
print(json.dumps({(f.alias or n): str(f.annotation) for n, f in C.model_fields.items() if n not in deprecated}))
"""


def _python(code: str, *args: str) -> str:
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=600, env=environ, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(("profile", "stage"), [("zero2", 2), ("zero2_offload", 2), ("zero3", 3)])
@pytest.mark.parametrize("job", ["train_2node", "demo"])
def test_deepspeed_accepts_every_profile(
    profile: str, stage: int, job: str, resolve: Callable[..., ResolvedJob], tmp_path: Path
) -> None:
    resolved = resolve(job, sets=[f"deepspeed.profile={profile}"])
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(resolved.ds_config))
    seen = json.loads(_python(_VALIDATE, str(path)))
    assert seen == {"stage": stage, "bf16": resolved.job.training.precision == "bf16", "clip": 1.0}


def test_the_known_keys_are_those_of_deepspeed() -> None:
    real: dict[str, str] = json.loads(_python(_FIELDS))
    ours = rendering.INTEGER_KEYS | rendering.SWITCH_KEYS | rendering.SECTION_KEYS | rendering.OTHER_KEYS
    assert set(real) - ours == set(), "new in DeepSpeed"
    assert ours - set(real) == set(), "no longer in DeepSpeed"
    assert {k for k, kind in real.items() if "'int'" in kind or "ZeroStageEnum" in kind} == rendering.INTEGER_KEYS
    assert {k for k, kind in real.items() if "bool" in kind} == rendering.SWITCH_KEYS
