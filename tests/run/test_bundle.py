from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import with_absolute_paths
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.run.bundle import (
    Bundles,
    bundles_added,
    next_number,
    render_bundles,
    render_job_yaml,
    run_written,
    switch_links,
)
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import JobFileRecord, ManifestRecord, PlannedMemoryRecord, load_resolved

Resolve = Callable[..., ResolvedJob]
MANIFEST = collect_manifest(jobs_dir() / "demo.yaml", code={})
SECRETS = {"WANDB_API_KEY": "wandb'secret $(x)", "HF_TOKEN": "hf_0123456789"}


def _write(
    resolved: ResolvedJob,
    *,
    secrets: Mapping[str, str] | None = None,
    job_yaml: str = "name: x\n",
    code: Mapping[str, bytes] | None = None,
    manifest: ManifestRecord = MANIFEST,
) -> RunDir:
    run = RunDir(Path(resolved.run_dir))
    with run_written(run, _render(resolved, secrets=secrets, job_yaml=job_yaml, manifest=manifest), code=code or {}):
        return run


def _render(
    resolved: ResolvedJob,
    *,
    secrets: Mapping[str, str] | None = None,
    job_yaml: str = "name: x\n",
    manifest: ManifestRecord = MANIFEST,
) -> Bundles:
    return render_bundles(resolved, job_yaml_text=job_yaml, secrets=secrets or {}, manifest=manifest)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_run_folder_holds_everything_a_node_needs(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve("demo", run_dir=tmp_path / "runs" / "r")
    run = _write(resolved)
    bundle = run.bundle(1)
    names = {"job.yaml", "resolved.json", "job.sbatch", "env.sh", "ds_config.json", "manifest.json"}
    assert {p.name for p in bundle.path.iterdir()} == names
    assert {p.name for p in run.path.iterdir()} == {*names, "bundles", "logs"}
    assert load_resolved(bundle) == resolved
    assert json.loads(bundle.ds_config_json.read_text()) == resolved.ds_config
    assert bundle.job_yaml.read_text() == "name: x\n"
    assert os.access(bundle.job_sbatch, os.X_OK)
    assert '"$RUN_DIR" --bundle 1 --launcher' in bundle.job_sbatch.read_text()
    assert str(bundle.env_sh) in bundle.job_sbatch.read_text()
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
    bundle = run.bundle(1)
    assert {_mode(p) for p in (run.path, run.logs, run.bundles, bundle.path, bundle.job_sbatch)} == {0o700}
    files = [p for p in bundle.path.iterdir() if p != bundle.job_sbatch]
    assert {_mode(p) for p in files} == {0o600}


def test_secrets_are_in_one_file_that_only_the_owner_reads(resolve: Resolve, tmp_path: Path) -> None:
    run = _write(resolve(run_dir=tmp_path / "r", environ=SECRETS), secrets=SECRETS)
    secrets_env = run.bundle(1).secrets_env
    assert _mode(secrets_env) == 0o600
    for path in run.path.rglob("*"):
        if path.is_file() and path.name != secrets_env.name:
            assert not any(value in path.read_text() for value in SECRETS.values()), path
    printed = subprocess.run(
        ["bash", "-c", f'. {secrets_env}; printf %s "$WANDB_API_KEY"'], capture_output=True, text=True, check=True
    )
    assert printed.stdout == SECRETS["WANDB_API_KEY"]


@pytest.mark.parametrize("secret", ["hf_0123456789", 'quo"te\\and back', "ünïcødé-token"])
def test_a_secret_that_slipped_into_the_job_is_refused_and_nothing_is_written(
    secret: str, resolve: Resolve, tmp_path: Path
) -> None:
    resolved = resolve(run_dir=tmp_path / "runs" / "r", environ={"HF_TOKEN": secret})
    with pytest.raises(UsageError, match="HF_TOKEN") as caught:
        _write(resolved, secrets={"HF_TOKEN": secret}, manifest=replace(MANIFEST, host=f"login {secret}"))
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


def test_a_run_folder_whose_submission_fails_is_gone_with_its_new_parents(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "a" / "r")
    with pytest.raises(KeyboardInterrupt), run_written(RunDir(tmp_path / "a" / "r"), _render(resolved), code={}):
        assert (tmp_path / "a" / "r").is_dir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def _tree(run: RunDir) -> dict[str, bytes | str]:
    """Every file and link of the run folder, by its path."""
    found = {p: str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in run.path.rglob("*") if not p.is_dir()}
    return {str(p.relative_to(run.path)): value for p, value in found.items()}


def _next(run: RunDir, resolved: ResolvedJob) -> Bundles:
    return _render(resolved.model_copy(update={"bundle": next_number(run)}))


def test_every_fallback_of_memory_auto_has_a_bundle_that_names_the_next(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "r", environ=SECRETS)
    assert resolved.memory is not None
    count = len(resolved.memory.options)
    of_before = PlannedMemoryRecord(option="of the bundle before", planned_gb=1.0)
    run = _write(resolved, secrets=SECRETS, manifest=replace(MANIFEST, memory=of_before))
    assert run.bundle_numbers() == list(range(1, count + 1))
    chain = [load_resolved(run.bundle(number)) for number in run.bundle_numbers()]
    assert [r.fallback_bundle for r in chain] == [*range(2, count + 1), None]
    for number, each in enumerate(chain, 1):
        bundle, option = run.bundle(number), resolved.memory.options[number - 1]
        assert each.bundle == number
        assert json.loads(bundle.ds_config_json.read_text()) == each.ds_config
        assert json.loads(bundle.manifest_json.read_text())["memory"]["option"] == option.words
        assert f"--bundle {number} " in bundle.job_sbatch.read_text()
        assert str(bundle.secrets_env) in bundle.env_sh.read_text()
        assert _mode(bundle.secrets_env) == 0o600
    assert len({r.config_hash for r in chain}) == count


def test_a_later_bundle_leaves_every_byte_of_the_run_folder_as_it_is(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve("demo", run_dir=tmp_path / "r")
    run = _write(resolved)
    before = _tree(run)
    with bundles_added(run, _next(run, resolved)):
        pass
    assert run.bundle_numbers() == [1, 2]
    after = _tree(run)
    assert {name: after[name] for name in before} == before
    assert "--bundle 2 " in run.bundle(2).job_sbatch.read_text()
    assert f". {run.bundle(2).env_sh}\n" in run.bundle(2).job_sbatch.read_text()
    assert _mode(run.bundle(2).path) == 0o700


def test_a_bundle_whose_submission_fails_is_gone_and_its_number_is_free(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve("demo", run_dir=tmp_path / "r")
    run = _write(resolved)
    before = _tree(run)
    with pytest.raises(KeyboardInterrupt), bundles_added(run, _next(run, resolved)):
        assert run.bundle_numbers() == [1, 2]
        raise KeyboardInterrupt
    assert _tree(run) == before
    assert next_number(run) == 2


def test_a_bundle_of_another_process_is_neither_changed_nor_removed(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve("demo", run_dir=tmp_path / "r")
    run = _write(resolved)
    before = _tree(run)
    with pytest.raises(UsageError, match="cannot write in"), bundles_added(run, _render(resolved)):
        pass
    assert _tree(run) == before


def test_the_links_are_relative_and_lead_to_the_bundle_that_was_submitted(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "r", environ=SECRETS)
    run = _write(resolved, secrets=SECRETS)
    links = {p.name: str(p.readlink()) for p in run.path.iterdir() if p.is_symlink()}
    names = {p.name for p in run.bundle(1).path.iterdir()} - {"secrets.env"}
    assert links == {name: f"bundles/1/{name}" for name in names}
    with bundles_added(run, _render(resolved.model_copy(update={"bundle": 7}), secrets=SECRETS)):
        pass
    switch_links(run, 7)
    moved = run.path.rename(tmp_path / "moved")
    assert {(moved / name).readlink() for name in names} == {Path("bundles/7") / name for name in names}
    assert "--bundle 7 " in RunDir(moved).links.job_sbatch.read_text()
    assert not list(moved.glob(".*"))


def test_a_link_leads_to_a_bundle_at_every_moment(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve("demo", run_dir=tmp_path / "r")
    run = _write(resolved)
    with bundles_added(run, _next(run, resolved)):
        pass
    reader = (
        "import os, sys\n"
        "print(flush=True)\n"
        "while os.path.exists(sys.argv[1]): os.stat(sys.argv[2]); os.readlink(sys.argv[2])\n"
    )
    goes_on = tmp_path / "goes_on"
    goes_on.touch()
    argv = [sys.executable, "-c", reader, str(goes_on), str(run.links.job_sbatch)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for number in (2, 1) * 200:
            switch_links(run, number)
        goes_on.unlink()
    assert process.returncode == 0


@pytest.mark.parametrize("job", sorted(p.stem for p in jobs_dir().glob("*.yaml")))
def test_job_yaml_gives_the_same_job_when_it_is_read_again(job: str, tmp_path: Path) -> None:
    environ = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d/${x}"}
    sets = ["training.learning_rate=3e-5", "slurm.time=2-00:00:00", "slurm.comment=on: #1 'x' \"y\" 日本"]
    first = load_job(jobs_dir() / f"{job}.yaml", sets=sets, environ=environ)
    path = tmp_path / "job.yaml"
    path.write_text(render_job_yaml(first.config, source=first.source, sets=[*sets, "a=\nb"]), encoding="utf-8")
    assert load_job(path, environ={}).config == first.config


def test_job_yaml_means_the_same_data_from_every_folder(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\ndata: {roots: [demo_data, /d], image_roots: {/theirs: frames}}\nmodel: {path: ~/m}\n")
    given = load_job(job, environ={}).config
    job.write_text(render_job_yaml(with_absolute_paths(given, tmp_path), source="x", sets=[]), encoding="utf-8")
    again = load_job(job, environ={}).config
    assert [root.path for root in again.data.roots] == [str(tmp_path / "demo_data"), "/d"]
    assert again.data.image_roots == {"/theirs": str(tmp_path / "frames")}
    assert again.model.path == str(Path("~/m").expanduser())
    # A key that was not given stays one that was not given.
    assert again.model.model_fields_set == {"path"}
    assert "preflight" not in again.model_fields_set


def test_the_manifest_records_what_the_run_was_made_from(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\n")
    code = {"loss.py": b"x = 1\n"}
    manifest = collect_manifest(job, code=code)
    reported = subprocess.run(["sha256sum", str(job)], capture_output=True, text=True, check=True).stdout.split()
    assert manifest.job_file == JobFileRecord(path=str(job), sha256=reported[0])
    assert manifest.packages["jinja2"] is not None
    assert set(manifest.templates) >= {"sbatch/base.sbatch.j2", "env/h800-ib.yaml", "deepspeed/zero3.json"}
    assert manifest.python.executable == sys.executable
    assert manifest.code.files == {"loss.py": hashlib.sha256(b"x = 1\n").hexdigest()}


def test_the_manifest_has_the_commit_of_the_checkout(tmp_path: Path) -> None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        pytest.skip("the tests do not run from a git checkout")
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert MANIFEST.git is not None and MANIFEST.git.commit == head


def test_collecting_the_manifest_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from janus_cluster.run.manifest import collect_manifest; "
        f"collect_manifest(Path({str(jobs_dir() / 'demo.yaml')!r}), code={{}}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0
