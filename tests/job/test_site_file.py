"""The site's own files: defaults under every job, profiles by name and by path, and what a wrong one prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.load import LoadedJob, load_job
from janus_cluster.job.profiles import load_env_profile, load_preflight_profile, nearest_gate
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.plan.hardware import find_gpu

SITE = """\
slurm:
  partition: gpu
  time: 2-00:00:00
hardware: {gpu_type: h200}
environment: {profile: h200-ib}
runs_dir: /scratch/runs
"""
ENVIRON = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A JANUS_HOME with a site.yaml."""
    write(tmp_path / "home/site/site.yaml", SITE)
    return tmp_path / "home"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(home: Path, job: str | Path = "train_2node", *sets: str, **environ: str) -> LoadedJob:
    path = job if isinstance(job, Path) else jobs_dir() / f"{job}.yaml"
    return load_job(path, sets=sets, environ=ENVIRON | environ, site=home / "site")


def resolve(home: Path, job: str | Path = "train_2node", *sets: str) -> ResolvedJob:
    environ = ENVIRON | {"JANUS_HOME": str(home)}
    return resolve_job(
        load(home, job, *sets), run_dir=home / "runs/x", cluster="slurm", environ=environ, cwd=home, python="/python"
    )


def test_defaults_of_the_site_are_under_every_job_with_their_origin(home: Path) -> None:
    loaded = load(home)
    label = str(home / "site/site.yaml")
    assert loaded.config.slurm == {"partition": "gpu", "time": "2-00:00:00", "comment": "JanusVLN training"}
    assert (loaded.origins["slurm.partition"], loaded.origins["slurm.time"]) == (f"{label}:2", f"{label}:3")
    assert loaded.origins["hardware.gpu_type"] == f"{label}:4"
    assert loaded.origins["slurm.comment"].endswith("train_2node.yaml:11")
    resolved = resolve(home)
    assert (resolved.preflight_profile, resolved.sbatch_options["gres"]) == ("h200-ib", "gpu:h200:8")
    assert resolved.sbatch_options["partition"] == "gpu"


def test_a_job_file_wins_over_the_site_and_set_over_both(home: Path) -> None:
    assert load(home, "preflight").config.slurm["time"] == "00:15:00"
    loaded = load(home, "preflight", "slurm.partition=debug")
    assert (loaded.config.slurm["partition"], loaded.origins["slurm.partition"]) == ("debug", "--set")
    assert load(home, "demo").config.hardware.gpu_type == "h800"


def test_a_variable_of_the_job_that_is_not_set_leaves_the_sites_value(home: Path) -> None:
    loaded = load(home)
    assert (loaded.config.runs_dir, loaded.origins["runs_dir"]) == ("/scratch/runs", f"{home}/site/site.yaml:6")
    assert load(home, "train_2node", OUTPUT_DIR="/mine").config.runs_dir == "/mine"


def test_config_show_prints_the_origin_of_each_such_value(home: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "janus_cluster.cli", "config", "show", "preflight", "--json"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=os.environ | {"JANUS_HOME": str(home)}, capture_output=True, text=True, check=True
    )
    shown = json.loads(done.stdout)
    assert shown["slurm.partition"] == {"value": "gpu", "origin": "home/site/site.yaml:2"}
    assert shown["environment.profile"] == {"value": "h200-ib", "origin": "home/site/site.yaml:5"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slurm: {partition: gpu}\nhardware: {gpu_typ: h200}\n", ("site.yaml:2", "hardware.gpu_typ", "gpu_type?")),
        ("name: ours\n", ("site.yaml:1", "name", "belongs in a job file")),
        ("hardware: {gpus_per_node: many}\n", ("site.yaml:1", "hardware.gpus_per_node", '"many"')),
        ("a: [\n", ("site.yaml:2", "not readable as YAML")),
        ("runs_dir: ${NOT_SET}\n", ("site.yaml:1", "runs_dir", "${NOT_SET} is not set")),
    ],
)
def test_a_mistake_names_the_sites_file_and_the_key(home: Path, text: str, words: tuple[str, ...]) -> None:
    write(home / "site/site.yaml", text)
    with pytest.raises(UsageError) as caught:
        load(home, "preflight")
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_sandbox_is_another_slurm_and_has_no_defaults_of_the_site(home: Path) -> None:
    from janus_cluster.desk.submit import Request, load_request

    environ = ENVIRON | {"JANUS_HOME": str(home)}
    for cluster, partition in (("slurm", "gpu"), ("local", "gpu"), ("sandbox", None)):
        config = load_request(Request(job="demo", cluster=cluster), environ).config  # type: ignore[arg-type]
        assert config.slurm.get("partition") == partition


def test_the_gate_takes_a_profile_as_a_path_on_the_command_line(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "gate.yaml", OURS)
    argv = [sys.executable, "-m", "janus_cluster.cli", "preflight", "--lint-env", "--json", "--profile"]
    environ = os.environ | {"JANUS_HOME": str(home)}
    for name, code in (("./gate.yaml", (0, 1)), ("h200-ib", (0, 1)), ("any", (0, 1)), ("h201-ib", (2,))):
        done = subprocess.run([*argv, name], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode in code, done.stderr
    assert "did you mean h20-ib" in done.stderr or "did you mean h200-ib" in done.stderr


OURS = "like: h800-roce\nhca: {ports_min: 4}\nlimits:\n  memory_gib: {warn_below: 900}\n"
VARIABLES = "like: h800-roce\nvariables:\n  - {name: NCCL_IB_TC, value: '106', reason: lossless class}\n"


def test_a_sites_own_profiles_are_found_by_name_and_build_on_shipped_ones(home: Path) -> None:
    write(home / "site/preflight/ours.yaml", OURS)
    write(home / "site/env/ours.yaml", VARIABLES)
    resolved = resolve(home, "train_2node", "environment.profile=ours", "hardware.gpu_type=h800")
    assert resolved.preflight_profile == "ours"
    shipped, own = load_preflight_profile("h800-roce"), resolved.preflight_thresholds
    assert own["hca"] == shipped["hca"] | {"ports_min": 4, "source": f"{home}/site/preflight/ours.yaml"}
    assert own["limits"]["memory_gib"]["warn_below"] == 900
    assert own["rails"]["together_gb_per_s"]["fail_below"] == shipped["rails"]["together_gb_per_s"]["fail_below"] / 2
    env = {v.name: v for v in resolved.env}
    assert (env["NCCL_IB_TC"].value, env["NCCL_IB_TC"].origin) == ("106", f"{home}/site/env/ours.yaml")
    assert env["NCCL_NET"].origin == "templates/env/h800-roce.yaml"


def test_a_sites_profile_may_have_the_name_of_the_shipped_one_that_it_builds_on(home: Path) -> None:
    write(home / "site/preflight/h800-ib.yaml", "like: h800-ib\nhca: {ports_min: 2}\n")
    assert load_preflight_profile("h800-ib", site=home / "site")["hca"]["ports_min"] == 2
    assert load_preflight_profile("h800-ib")["hca"]["ports_min"] == 8


def test_a_path_is_relative_to_the_file_that_has_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    write(folder / "profiles/gate.yaml", OURS + "part: ../gpu/h999.yaml\n")
    write(folder / "profiles/vars.yaml", VARIABLES)
    part = (jobs_dir().parent / "templates/gpu/h200.yaml").read_text().replace("NVIDIA H200", "NVIDIA H999")
    write(folder / "gpu/h999.yaml", part.replace("memory_gb: 141", "memory_gb: 200"))
    job = write(
        folder / "mine.yaml",
        "name: mine\nkind: preflight\nhardware: {gpu_type: gpu/h999.yaml}\n"
        "environment: {profile: profiles/vars.yaml}\npreflight: {profile: ./profiles/gate.yaml}\n",
    )
    monkeypatch.chdir(tmp_path)
    resolved = resolve(home, job)
    assert resolved.preflight_profile == str(folder / "profiles/gate.yaml")
    assert resolved.preflight_thresholds["gpu"]["name"] == "NVIDIA H999"
    assert resolved.sbatch_options["gres"] == "gpu:h999:8"
    gpu = find_gpu(resolved.job.hardware.gpu_type)
    assert gpu is not None and gpu.memory_gb == 200
    # On the command line a path is relative to the folder that one is in.
    typed = resolve(home, job, "preflight.profile=project/profiles/gate.yaml")
    assert typed.preflight_profile == resolved.preflight_profile
    assert nearest_gate(str(folder / "profiles/vars.yaml")) == "h800-roce"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("environment.profile=h800-rose", ("--set: environment.profile", "did you mean h800-roce?")),
        ("preflight.profile=h20-bi", ("--set: preflight.profile", "did you mean h20-ib?")),
        ("preflight.profile=./absent.yaml", ("preflight.profile", "absent.yaml: no such file")),
        ("hardware.gpu_type=gpus/b200.yaml", ("hardware.gpu_type", "b200.yaml: no such file")),
        ("preflight.thresholds.part=h201", ("preflight.thresholds.part", "did you mean h20", "'h201'")),
    ],
)
def test_a_wrong_name_is_refused_with_those_that_there_are(home: Path, option: str, words: tuple[str, ...]) -> None:
    write(home / "site/preflight/ours.yaml", OURS)
    with pytest.raises(UsageError) as caught:
        resolve(home, "train_2node", option)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "h" in (caught.value.hint or "") and f"{home}/site" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("like: h800-ib\nhca: {port_min: 4}\n", ("ours.yaml: hca.port_min", "h800-ib", "ports_min?")),
        ("like: h800-ib\nhca: {ports_min: four}\n", ("ours.yaml: hca.ports_min", "'four'", "a number")),
        ("like: h800-ib\nhca: 5\n", ("ours.yaml: hca", "5 is not a mapping")),
        ("like: h800\n", ("ours.yaml: like", "'h800'")),
        ("like: ours\n", ("ours.yaml: like", "'ours'")),
        ("like: theirs\n", ("like", "circle")),
        ("hca: {ports_min: 4}\n", ("ours.yaml: like: must be given",)),
        ("like: h800-ib\npart: h000\n", ("ours.yaml: part", "'h000'")),
        ("- a\n", ("ours.yaml", "a profile is a mapping")),
        ("a: [\n", ("ours.yaml", "cannot be read as YAML")),
    ],
)
def test_a_mistake_in_a_sites_profile_names_file_and_key(home: Path, text: str, words: tuple[str, ...]) -> None:
    write(home / "site/preflight/ours.yaml", text)
    write(home / "site/preflight/theirs.yaml", "like: ours\n")
    with pytest.raises(UsageError) as caught:
        load_preflight_profile("ours", site=home / "site")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "text", ["like: h800-ib\nvariabels: []\n", "variables: [{name: A}]\n", "- {name: A, value: b, why: c}\n", "5\n"]
)
def test_a_mistake_in_a_sites_variables_names_the_file(home: Path, text: str) -> None:
    write(home / "site/env/ours.yaml", text)
    with pytest.raises(UsageError, match=r"ours\.yaml"):
        load_env_profile("ours", site=home / "site")


def test_a_mistake_in_a_part_names_file_and_key(home: Path) -> None:
    text = (jobs_dir().parent / "templates/gpu/h200.yaml").read_text()
    path = write(home / "site/gpu/b200.yaml", text.replace("peak_tflops: 989", "peak_tflops: fast"))
    with pytest.raises(UsageError, match=r"b200\.yaml: peak_tflops"):
        find_gpu(str(path))
