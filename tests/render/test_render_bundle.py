from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.config.load import load_job
from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import UsageError
from janus_cluster.render.bundle import collect_manifest, render_job_yaml, write_bundle
from janus_cluster.resources import jobs_dir
from janus_cluster.rundir import RunDir

Resolve = Callable[..., ResolvedJob]
SECRETS = {"WANDB_API_KEY": "wandb'secret $(x)", "HF_TOKEN": "hf_0123456789"}


def _write(
    resolved: ResolvedJob,
    *,
    secrets: Mapping[str, str] | None = None,
    job_yaml: str = "name: x\n",
    code: Mapping[str, bytes] | None = None,
    **manifest: Any,
) -> RunDir:
    return write_bundle(
        resolved,
        job_yaml_text=job_yaml,
        secrets=secrets or {},
        manifest={"schema_version": 1, **manifest},
        code=code or {},
        final_dir=Path(resolved.run_dir),
    )


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_run_folder_holds_everything_a_node_needs(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "runs" / "r")
    run = _write(resolved)
    names = {p.name for p in run.path.iterdir()}
    assert names == {"job.yaml", "resolved.json", "job.sbatch", "env.sh", "ds_config.json", "manifest.json", "logs"}
    assert ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8")) == resolved
    assert json.loads(run.ds_config_json.read_text()) == resolved.ds_config
    assert run.job_yaml.read_text() == "name: x\n"
    assert os.access(run.job_sbatch, os.X_OK)
    assert [p.name for p in run.path.parent.iterdir()] == ["r"]


def test_the_code_is_part_of_the_run_folder_and_private(resolve: Resolve, tmp_path: Path) -> None:
    code = {"__init__.py": b"", "training/data/loss.py": b"x = 1\n", "_data/templates/a.yaml": b"a"}
    before = os.umask(0)
    try:
        run = _write(resolve(run_dir=tmp_path / "r"), code=code)
    finally:
        os.umask(before)
    package = run.code / "janus_cluster"
    below = list(run.code.rglob("*"))
    assert {str(p.relative_to(package)): p.read_bytes() for p in below if p.is_file()} == code
    assert {_mode(p) for p in below} == {0o600, 0o700}
    installed = _write(resolve(run_dir=tmp_path / "i", sets=["environment.code=installed"]), code=code)
    assert not installed.code.exists()


def test_code_that_cannot_be_written_leaves_no_run_folder(resolve: Resolve, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        _write(resolve(run_dir=tmp_path / "runs" / "r"), code={"a.py": b"", "b" * 300: b""})
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_is_private(resolve: Resolve, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = _write(resolve(run_dir=tmp_path / "runs" / "r", environ=SECRETS), secrets=SECRETS)
    finally:
        os.umask(before)
    assert (_mode(run.path), _mode(run.logs), _mode(run.job_sbatch)) == (0o700, 0o700, 0o700)
    files = [p for p in run.path.iterdir() if p.is_file() and p != run.job_sbatch]
    assert {_mode(p) for p in files} == {0o600}


def test_secrets_lie_in_one_file_that_only_the_owner_reads(resolve: Resolve, tmp_path: Path) -> None:
    run = _write(resolve(run_dir=tmp_path / "r", environ=SECRETS), secrets=SECRETS)
    assert _mode(run.secrets_env) == 0o600
    for path in run.path.rglob("*"):
        if path.is_file() and path != run.secrets_env:
            assert not any(value in path.read_text() for value in SECRETS.values()), path
    printed = subprocess.run(
        ["bash", "-c", f'. {run.secrets_env}; printf %s "$WANDB_API_KEY"'], capture_output=True, text=True, check=True
    )
    assert printed.stdout == SECRETS["WANDB_API_KEY"]


@pytest.mark.parametrize("secret", ["hf_0123456789", 'quo"te\\and back', "ünïcødé-token"])
def test_a_secret_that_slipped_into_the_job_is_refused_and_nothing_is_written(
    secret: str, resolve: Resolve, tmp_path: Path
) -> None:
    resolved = resolve(run_dir=tmp_path / "runs" / "r", environ={"HF_TOKEN": secret})
    with pytest.raises(UsageError, match="HF_TOKEN") as caught:
        _write(resolved, secrets={"HF_TOKEN": secret}, note=f"login {secret}")
    assert secret not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_touched(resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists already"):
        _write(resolve(run_dir=tmp_path / "r"))
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_dangling_link_in_its_place_is_not_followed(resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "r").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists already"):
        _write(resolve(run_dir=tmp_path / "r"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_place_that_cannot_be_written_leaves_nothing(resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write the run folder") as caught:
        _write(resolve(run_dir=tmp_path / "file" / "runs" / "r"))
    assert "runs_dir" in (caught.value.hint or "")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failure_half_way_leaves_nothing_not_even_new_parents(resolve: Resolve, tmp_path: Path) -> None:
    # The staging folder can be made, but a name of 300 bytes cannot be moved into place.
    with pytest.raises(UsageError, match="too long"):
        _write(resolve(run_dir=tmp_path / "a" / "b" / ("r" * 300)))
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_utf_8_is_refused_and_nothing_is_written(resolve: Resolve, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        _write(resolve(run_dir=tmp_path / "r"), job_yaml="name: \udc80\n")
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_cannot_be_rendered_leaves_nothing(resolve: Resolve, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="control character"):
        _write(resolve(run_dir=tmp_path / "runs" / "r", sets=['environment.setup=["a\\u0007b"]']))
    assert list(tmp_path.iterdir()) == []


def test_secrets_other_than_the_resolved_ones_are_a_bug(resolve: Resolve, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="secrets"):
        _write(resolve(run_dir=tmp_path / "r"), secrets={"HF_TOKEN": "x"})


@pytest.mark.parametrize("job", sorted(p.stem for p in jobs_dir().glob("*.yaml")))
def test_job_yaml_gives_the_same_job_when_it_is_read_again(job: str, tmp_path: Path) -> None:
    environ = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d/${x}"}
    sets = ["training.learning_rate=3e-5", "slurm.time=2-00:00:00", "slurm.comment=on: #1 'x' \"y\" 日本"]
    first = load_job(jobs_dir() / f"{job}.yaml", sets=sets, environ=environ)
    path = tmp_path / "job.yaml"
    path.write_text(render_job_yaml(first.config, source=first.source, sets=[*sets, "a=\nb"]), encoding="utf-8")
    assert load_job(path, environ={}).config == first.config


def test_the_manifest_says_what_the_run_was_made_from(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\n")
    code = {"loss.py": b"x = 1\n"}
    manifest = collect_manifest(job, code=code)
    told = subprocess.run(["sha256sum", str(job)], capture_output=True, text=True, check=True).stdout.split()
    assert manifest["job_file"] == {"path": str(job), "sha256": told[0]}
    assert manifest["packages"]["jinja2"] is not None
    assert set(manifest["templates"]) >= {"sbatch/base.sbatch.j2", "env/h800-ib.yaml", "deepspeed/zero3.json"}
    assert manifest["python"]["executable"] == sys.executable
    assert manifest["code"]["files"] == {"loss.py": hashlib.sha256(b"x = 1\n").hexdigest()}
    json.dumps(manifest)


def test_the_manifest_has_the_commit_of_the_checkout(tmp_path: Path) -> None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        pytest.skip("the tests do not run from a git checkout")
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert collect_manifest(jobs_dir() / "demo.yaml", code={})["git"]["commit"] == head


def test_collecting_the_manifest_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from janus_cluster.render.bundle import collect_manifest; "
        f"collect_manifest(Path({str(jobs_dir() / 'demo.yaml')!r}), code={{}}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0
