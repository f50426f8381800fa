from __future__ import annotations

from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir

ENVIRON = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}


def resolve(name: str, *sets: str, nodes: int | None = None, environ: dict[str, str] | None = None) -> ResolvedJob:
    env = ENVIRON | (environ or {})
    loaded = load_job(jobs_dir() / f"{name}.yaml", sets=sets, environ=env, options={"nodes": nodes})
    return resolve_job(
        loaded, run_dir=Path("/runs/x"), cluster="slurm", environ=env, cwd=Path("/home/me"), python="/env/bin/python"
    )


def refused(name: str, *sets: str, nodes: int | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(name, *sets, nodes=nodes)
    return str(caught.value)


@pytest.mark.parametrize(("name", "world_size", "batch"), [("train_1node", 8, 64), ("train_2node", 16, 128)])
def test_world_size_and_effective_batch_follow_from_the_job(name: str, world_size: int, batch: int) -> None:
    resolved = resolve(name)
    assert (resolved.world_size, resolved.processes_per_node) == (world_size, 8)
    assert resolved.effective_batch_size == resolved.ds_config["train_batch_size"] == batch
    assert resolved.preflight_profile == "h800-ib"
    assert resolved.sbatch_options["gres"] == "gpu:h800:8"


def test_the_demo_asks_for_eight_gpus_and_computes_on_the_cpu() -> None:
    resolved = resolve("demo")
    assert (resolved.processes_per_node, resolved.world_size) == (1, 2)
    assert resolved.sbatch_options["gres"] == "gpu:h800:8"
    assert resolved.preflight_profile == "cpu"
    assert {v.name: v.value for v in resolved.env}["DS_ACCELERATOR"] == "cpu"


def test_a_wrong_batch_arithmetic_shows_what_to_type() -> None:
    output = refused("train_2node", nodes=1)
    assert "128" in output
    assert "--set training.gradient_accumulation_steps=16" in output
    assert "--set training.effective_batch_size=64" in output


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["hardware.processes_per_node=9"], ["hardware.processes_per_node: 9", "1 to 8"]),
        (["environment.profile=cpu"], ["environment.profile", "h800-ib"]),
        (["hardware.device=cpu"], ["environment.profile", "allowed: cpu"]),
        (["model.path="], ["model.path: must be given"]),
        (["data.roots=[]"], ["data.roots: must be given"]),
        (["data.min_pixels=500000"], ["data.min_pixels", "data.max_pixels"]),
        (
            ["training.tune={llm: false, projector: false, vision: false, vggt_merger: false, action_head: false}"],
            ["training.tune", "nothing would be learnt"],
        ),
        (
            [
                "training.segment_weights={subinstruction: 0, description_2d: 0, description_3d: 0, action: 0}",
                "training.action_loss_weight=0",
            ],
            ["training.segment_weights", "nothing would be learnt"],
        ),
    ],
)
def test_impossible_combinations_are_refused(sets: list[str], words: list[str]) -> None:
    output = refused("train_2node", *sets)
    for word in ["train_2node.yaml", *words]:
        assert word in output


def test_relative_paths_mean_the_submitters_folder() -> None:
    assert resolve("demo").job.data.roots[0].path == "/home/me/demo_data"


def test_secrets_are_known_by_name_only() -> None:
    resolved = resolve("train_2node", environ={"HF_TOKEN": "hunter2"})
    assert resolved.secret_names == ("HF_TOKEN",)
    assert "hunter2" not in resolved.model_dump_json()


def test_equal_jobs_have_equal_hashes_whatever_their_run_folder() -> None:
    assert resolve("demo").config_hash == resolve("demo").config_hash
    assert resolve("demo").config_hash != resolve("demo", "training.seed=7").config_hash


def test_the_resolved_job_survives_its_file() -> None:
    resolved = resolve("train_2node")
    assert ResolvedJob.model_validate_json(resolved.model_dump_json(indent=2)) == resolved
