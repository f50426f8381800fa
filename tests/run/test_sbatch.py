from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2
import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import templates_dir
from janus_cluster.run.bundle import render_env_of
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.failure import ScriptFailure
from janus_cluster.run.sbatch import quote_sbatch, render_each_node, render_sbatch, template_name

Resolve = Callable[..., ResolvedJob]

HOSTILE_FOLDERS = [
    "two words",
    "it's",
    'echo "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a && b",
    "#hash",
    "ünïcødé 日本",
    "100%j",
    "-dash",
    "~tilde",
    "{{ run_dir }}",
    "* ?",
]
# In place of an interpreter: writes down its arguments and what of the environment it was given.
_RECORDER = """#!/bin/bash
[ "$1" = -c ] && exit "${IMPORT_FAILS:-0}"
printf '%s\\0' "$PWD" "$@" > "$RECORD"
env -0 > "$RECORD.env"
"""


def _recorder(folder: Path) -> Path:
    path = folder / "my python"
    path.write_text(_RECORDER)
    path.chmod(0o755)
    return path


def _run(
    resolved: ResolvedJob,
    tmp_path: Path,
    environ: Mapping[str, str] | None = None,
    preexec_fn: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The script, as the batch shell of a node would run it: another folder, almost no environment."""
    run = RunDir(Path(resolved.run_dir))
    bundle = run.bundle(resolved.bundle)
    bundle.path.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir(exist_ok=True)
    bundle.env_sh.write_text(render_env_of(resolved), encoding="utf-8")
    script = tmp_path / "spooled_script"
    script.write_text(render_sbatch(resolved), encoding="utf-8")
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RECORD": str(tmp_path / "record")} | dict(environ or {})
    return subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, timeout=600, cwd="/", env=clean, check=False,
        preexec_fn=preexec_fn,
    )  # fmt: skip


def _recorded(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    argv = (tmp_path / "record").read_bytes().decode().split("\0")[:-1]
    items = (tmp_path / "record.env").read_bytes().decode().split("\0")
    return argv, dict(item.split("=", 1) for item in items if item)


@pytest.mark.parametrize("folder", HOSTILE_FOLDERS)
def test_a_hostile_run_folder_arrives_as_it_is_and_runs_nothing(
    folder: str, resolve: Resolve, tmp_path: Path, shellcheck: str
) -> None:
    run_dir = tmp_path / folder / "run"
    resolved = resolve(run_dir=run_dir, python=str(_recorder(tmp_path)))
    done = _run(resolved, tmp_path)
    assert done.returncode == 0, done.stderr
    argv, environ = _recorded(tmp_path)
    options = ["--bundle", "1", "--launcher", "slurm"]
    assert argv == [str(run_dir), "-m", "janus_cluster.node.attempt", str(run_dir), *options]
    assert environ["NCCL_NET"] == "IB"
    assert not list(tmp_path.rglob("pwned"))
    assert subprocess.run([shellcheck, "-S", "warning", str(tmp_path / "spooled_script")], check=False).returncode == 0


def test_steps_inherit_the_scripts_environment_and_not_none(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path)))
    _run(resolved, tmp_path, {"SLURM_EXPORT_ENV": "NONE"})
    assert _recorded(tmp_path)[1]["SLURM_EXPORT_ENV"] == "ALL"
    assert "#SBATCH --export=NONE\n" in render_sbatch(resolved)


def test_the_scripts_comment_on_its_environment_is_what_it_asks_for(resolve: Resolve) -> None:
    text = render_sbatch(resolve(sets=["slurm.export=ALL"]))
    assert "#SBATCH --export=ALL\n" in text and "export SLURM_EXPORT_ENV=ALL\n" in text
    assert "login environment" not in text


def test_the_same_script_runs_without_slurm(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path)))
    _run(resolved, tmp_path, {"JANUS_LAUNCHER": "local"})
    assert _recorded(tmp_path)[0][-2:] == ["--launcher", "local"]


@pytest.mark.parametrize(("soft", "most"), [(1024, 4096), (4096, 4096), (1024, None)])
def test_low_soft_limits_of_the_login_shell_are_raised(
    soft: int, most: int | None, resolve: Resolve, tmp_path: Path
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # A process without CAP_SYS_RESOURCE cannot raise what the machine grants.
    if most is not None:
        hard = most if hard < 0 else min(most, hard)
    soft = soft if hard < 0 else min(soft, hard)
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[ "$1" = -c ] || { ulimit -Sn; ulimit -Sl; ulimit -Hl; } > "$RECORD"\n')
    python.chmod(0o755)
    resolved = resolve(run_dir=tmp_path / "run", python=str(python))

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))

    assert _run(resolved, tmp_path, preexec_fn=lower).returncode == 0
    files, locked, lockable = (tmp_path / "record").read_text().split()
    assert (files, locked) == (str(65536 if hard < 0 else min(hard, 65536)), lockable)


def test_the_exit_code_is_that_of_the_attempt(resolve: Resolve, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[ "$1" = -c ] || exit 10\n')
    python.chmod(0o755)
    assert _run(resolve(run_dir=tmp_path / "run", python=str(python)), tmp_path).returncode == 10


def test_every_sbatch_line_is_before_the_first_command(resolve: Resolve) -> None:
    lines = render_sbatch(resolve(sets=["slurm.partition=h800"])).splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0] == "#!/bin/bash"
    assert len(directives) == 14 and max(directives) < first_command


def test_setup_lines_run_in_the_same_shell_before_env_sh(resolve: Resolve, tmp_path: Path) -> None:
    setup = [
        'export FROM_SETUP="$UNSET_VARIABLE"x',
        "for i in 1 2; do\n  export LAST=$i\ndone",
        "export NCCL_NET=Socket",
    ]
    resolved = _with_setup(resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path))), setup)
    done = _run(resolved, tmp_path)
    assert done.returncode == 0, done.stderr
    environ = _recorded(tmp_path)[1]
    assert (environ["FROM_SETUP"], environ["LAST"], environ["NCCL_NET"]) == ("x", "2", "IB")


def test_a_stop_signal_that_comes_early_is_handed_on(resolve: Resolve, tmp_path: Path) -> None:
    resolved = _with_setup(resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path))), ["kill -USR1 $$"])
    done = _run(resolved, tmp_path)
    assert done.returncode == 0, done.stderr
    assert _recorded(tmp_path)[1]["JANUS_STOP_SIGNAL"] == "USR1"


def test_the_submitted_code_comes_before_the_users_own_pythonpath(resolve: Resolve, tmp_path: Path) -> None:
    run = tmp_path / "it's $(touch pwned)"
    python = str(_recorder(tmp_path))
    _run(resolve(run_dir=run, python=python, sets=["environment.variables.PYTHONPATH=/mine:/too"]), tmp_path)
    assert _recorded(tmp_path)[1]["PYTHONPATH"] == f"{run}/code:/mine:/too"
    _run(resolve(run_dir=run, python=python), tmp_path)
    assert _recorded(tmp_path)[1]["PYTHONPATH"] == f"{run}/code"
    _run(resolve(run_dir=run, python=python, sets=["environment.code=installed"]), tmp_path)
    assert "PYTHONPATH" not in _recorded(tmp_path)[1]


def test_a_run_folder_that_pythonpath_would_split_is_refused(resolve: Resolve) -> None:
    with pytest.raises(UsageError, match="PYTHONPATH") as caught:
        render_sbatch(resolve(run_dir=Path("/shared/a:b/r")))
    assert "environment.code=installed" in (caught.value.hint or "")
    assert "PYTHONPATH" not in render_sbatch(
        resolve(run_dir=Path("/shared/a:b/r"), sets=["environment.code=installed"])
    )


def test_a_failing_setup_line_ends_the_job_and_is_named(resolve: Resolve, tmp_path: Path) -> None:
    resolved = _with_setup(
        resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path))), ["modul load cuda", "true"]
    )
    done = _run(resolved, tmp_path)
    assert done.returncode == 2
    assert "environment.setup: exit code 127 of: modul load cuda" in done.stderr
    assert not (tmp_path / "record").exists()


def test_why_the_script_ended_is_in_the_run_folder_until_it_begins_again(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path)))
    path = RunDir(Path(resolved.run_dir)).script_failure_json
    line = """modul 'C:\\new' "&" 日本\t%s"""
    _run(_with_setup(resolved, [line]), tmp_path, {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "h800-02"})
    failure = ScriptFailure.require(path)
    assert (failure.job_id, failure.node) == ("7", "h800-02")
    assert failure.message == f"environment.setup: exit code 127 of: {line}".replace("\t", " ")
    assert _run(resolved, tmp_path).returncode == 0
    assert not path.exists()


def test_failures_inside_sourced_scripts_and_functions_are_their_own_business(resolve: Resolve, tmp_path: Path) -> None:
    sourced = tmp_path / "activate"
    sourced.write_text("false\nf() { false; true; }\nf\nexport ACTIVATED=$NEVER_SET.\n")
    resolved = _with_setup(
        resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path))), [f"source {shlex.quote(str(sourced))}"]
    )
    done = _run(resolved, tmp_path)
    assert done.returncode == 0, done.stderr
    assert _recorded(tmp_path)[1]["ACTIVATED"] == "."


@pytest.mark.parametrize("line", ["source {}", ". {}", "source {} 2>/dev/null", 'source "$HOME/$(basename {})"'])
def test_a_sourced_file_that_was_read_is_no_failure_whatever_its_last_line(
    line: str, resolve: Resolve, tmp_path: Path
) -> None:
    bashrc = tmp_path / "bashrc"
    bashrc.write_text('export FROM_BASHRC=yes\n[ -n "$NEVER_SET" ] && export X=1\n')
    resolved = resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path)))
    done = _run(_with_setup(resolved, [line.format(bashrc)]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert _recorded(tmp_path)[1]["FROM_BASHRC"] == "yes"


@pytest.mark.parametrize("line", ["source /no/such/file", ". $NEVER_SET", "sourced_by_nobody x", "false"])
def test_a_file_that_was_not_read_is_a_failure(line: str, resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "run", python=str(_recorder(tmp_path)))
    done = _run(_with_setup(resolved, [line]), tmp_path)
    assert done.returncode == 2 and f"of: {line}" in done.stderr


def test_every_python_of_the_job_reads_names_as_utf8(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "实验", python=sys.executable)
    probe = "$PYTHON -c 'import os, sys; print(sys.flags.utf8_mode, os.path.exists(os.environ[\"RUN_DIR\"]))'"
    done = _run(_with_setup(resolved, ["export RUN_DIR", probe, "exit 0"]), tmp_path, {"LC_ALL": "zh_CN.GB18030"})
    assert done.stdout == "1 True\n", done.stderr


def _each_node(resolve: Resolve, folder: Path, lines: list[str], *argv: str) -> subprocess.CompletedProcess[str]:
    script = folder / "each_node.sh"
    text = render_each_node(resolve(sets=[f"environment.setup_each_node={lines}"]))
    assert text is not None
    script.write_text(text)
    environ = {"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "h800-02"}
    return subprocess.run(["bash", str(script), *argv], capture_output=True, text=True, env=environ, check=False)


def test_the_lines_for_each_node_run_before_its_task(resolve: Resolve, tmp_path: Path, shellcheck: str) -> None:
    assert render_each_node(resolve()) is None
    done = _each_node(resolve, tmp_path, ["export SCRATCH=/local/$SLURMD_NODENAME$1"], "printenv", "SCRATCH")
    assert (done.returncode, done.stdout) == (0, "/local/h800-02\n")
    assert subprocess.run([shellcheck, "-S", "warning", str(tmp_path / "each_node.sh")], check=False).returncode == 0


def test_a_line_for_each_node_that_fails_starts_no_task_and_names_its_node(resolve: Resolve, tmp_path: Path) -> None:
    done = _each_node(resolve, tmp_path, ["mkdir /proc/x"], "touch", str(tmp_path / "begun"))
    assert done.returncode == 2 and not (tmp_path / "begun").exists()
    assert "setup on h800-02: environment.setup_each_node: exit code 1 of: mkdir /proc/x" in done.stderr


def test_tracing_in_setup_does_not_show_secrets(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(
        run_dir=tmp_path / "run", python=str(_recorder(tmp_path)), environ={"WANDB_API_KEY": "hunter2hunter2"}
    )
    bundle = RunDir(Path(resolved.run_dir)).bundle(1)
    bundle.path.mkdir(parents=True)
    bundle.secrets_env.write_text("export WANDB_API_KEY=hunter2hunter2\n")
    done = _run(_with_setup(resolved, ["set -x"]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert _recorded(tmp_path)[1]["WANDB_API_KEY"] == "hunter2hunter2"
    assert "hunter2" not in done.stdout + done.stderr


def test_strictness_is_back_after_setup(resolve: Resolve, tmp_path: Path) -> None:
    text = render_sbatch(_with_setup(resolve(run_dir=tmp_path / "run"), ["true"]))
    body = text[: text.index("# Every exported variable")] + "\necho $NEVER_SET\necho went-on\n"
    (tmp_path / "run").mkdir()
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0 and "went-on" not in done.stdout


@pytest.mark.parametrize(
    ("python", "environ", "expected_text"),
    [
        ("/no/such/python", {}, "there is no /no/such/python"),
        (None, {"IMPORT_FAILS": "1"}, "cannot import janus_cluster"),
    ],
)
def test_an_interpreter_that_does_not_work_is_named(
    python: str | None, environ: dict[str, str], expected_text: str, resolve: Resolve, tmp_path: Path
) -> None:
    resolved = resolve(run_dir=tmp_path / "run", python=python or str(_recorder(tmp_path)))
    done = _run(resolved, tmp_path, environ)
    assert done.returncode == 2
    assert "environment.python" in done.stderr and expected_text in done.stderr
    assert not (tmp_path / "record").exists()


def test_the_real_interpreter_passes_the_check(resolve: Resolve, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 0\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    done = _run(resolve(run_dir=tmp_path / "run", python=str(python)), tmp_path)
    assert done.returncode == 0
    assert "environment.python" not in done.stderr


def test_a_run_folder_that_the_node_cannot_see_is_named(resolve: Resolve, tmp_path: Path) -> None:
    resolved = resolve(run_dir=tmp_path / "gone", python=str(_recorder(tmp_path)))
    script = tmp_path / "script"
    script.write_text(render_sbatch(resolved))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert "every node mounts" in done.stderr


@pytest.mark.parametrize("python", ["/opt/py\nthon", "/opt/\x1b[31m"])
def test_a_python_path_with_control_characters_is_refused(python: str, resolve: Resolve) -> None:
    with pytest.raises(UsageError, match=r"environment\.python"):
        render_sbatch(resolve(python=python))


def test_a_secret_in_a_setup_line_is_refused(resolve: Resolve) -> None:
    with pytest.raises(UsageError, match="HF_TOKEN"):
        render_sbatch(_with_setup(resolve(), ["export HF_TOKEN=abc"]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("gpu:h800:8", "=gpu:h800:8"),
        ("node[01-02],n3", "=node[01-02],n3"),
        ("two words", '="two words"'),
        ('a"b', '="a\\"b"'),
        ("a\\b", '="a\\\\b"'),
        ("#x", '="#x"'),
        ("", '=""'),
        ("日本", '="日本"'),
    ],
)
def test_values_are_quoted_as_sbatch_reads_them(value: str | None, text: str) -> None:
    assert quote_sbatch(value) == text


@pytest.mark.parametrize(
    ("job", "sets", "name"),
    [
        ("train_2node", [], "train_nodes.sbatch.j2"),
        ("train_1node", [], "train_1node.sbatch.j2"),
        ("preflight", [], "preflight.sbatch.j2"),
        ("demo", ["nodes=1"], "train_1node.sbatch.j2"),
    ],
)
def test_each_kind_of_job_has_its_template(job: str, sets: list[str], name: str, resolve: Resolve) -> None:
    assert template_name(resolve(job, sets=sets)) == name


def test_a_name_that_a_template_misspells_is_an_error(resolve: Resolve) -> None:
    templates = {p.name: p.read_text() for p in (templates_dir() / "sbatch").iterdir()} | {
        "train_nodes.sbatch.j2": "{{ no_such_name }}"
    }
    with pytest.raises(jinja2.UndefinedError, match="no_such_name"):
        render_sbatch(resolve(), templates=templates)


def test_rendering_reads_neither_folder_nor_environment(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, templates = resolve(), {p.name: p.read_text() for p in (templates_dir() / "sbatch").iterdir()}
    before = render_sbatch(resolved, templates=templates)
    monkeypatch.chdir("/")
    for name in list(os.environ):
        monkeypatch.delenv(name)
    assert render_sbatch(resolved, templates=templates) == before


def _with_setup(resolved: ResolvedJob, lines: list[str]) -> ResolvedJob:
    environment = resolved.job.environment.model_copy(update={"setup": tuple(lines)})
    return resolved.model_copy(update={"job": resolved.job.model_copy(update={"environment": environment})})
