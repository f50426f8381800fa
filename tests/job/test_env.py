from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.env import (
    check_setup,
    expand_on_node,
    parse_secrets_env,
    render_env_sh,
    render_secrets_env,
    resolve_env,
    split_secrets,
)
from janus_cluster.job.profiles import load_env_profile, profile_names
from janus_cluster.job.resolved import EnvVar

HOSTILE = [
    "plain",
    "",
    "two words",
    "it's",
    'echo "hi"',
    "$(touch pwned)",
    "`touch pwned`",
    "a; touch pwned",
    "a && touch pwned # x",
    "$HOME/${USER}",
    "back\\slash",
    "ünïcødé 日本",
    "line\nbreak",
    "tab\there",
    "!history",
    "~root",
    "-n",
    "*",
]
PROFILE = [
    {"name": "NCCL_DEBUG", "value": "WARN", "reason": "quiet", "source": "guide", "origin": "templates/env/p.yaml"},
    {
        "name": "NCCL_IB_HCA",
        "value": None,
        "reason": "found on the node",
        "source": "guide",
        "origin": "templates/env/p.yaml",
    },
    {
        "name": "OMP_NUM_THREADS",
        "value": "8",
        "reason": "image work.",
        "source": "guide",
        "origin": "templates/env/p.yaml",
        "limit": "cpus_per_process",
    },
]


def _what_arrives(text: str, names: list[str], cwd: Path) -> dict[str, str]:
    """The variables that a fresh shell exports after sourcing the text."""
    script = cwd / "env.sh"
    script.write_text(text, encoding="utf-8")
    probe = f". {shlex.quote(str(script))} && exec env -0"
    environ = {"PATH": os.environ["PATH"], "HOME": str(cwd)}
    done = subprocess.run(["bash", "-euc", probe], capture_output=True, cwd=cwd, env=environ, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(item.split("=", 1) for item in done.stdout.decode().split("\0") if item)
    return {name: found[name] for name in names}


def test_every_hostile_value_arrives_as_it_is_and_runs_nothing(tmp_path: Path) -> None:
    env = [EnvVar(name=f"V{i}", value=v, reason="why", origin="here") for i, v in enumerate(HOSTILE)]
    text = render_env_sh(env, secret_names=(), secrets_path="/nowhere")
    arrived = _what_arrives(text, [v.name for v in env], tmp_path)
    assert list(arrived.values()) == HOSTILE
    assert not (tmp_path / "pwned").exists()


def test_a_reference_to_the_nodes_own_variable_is_expanded_there_and_nothing_else_is(tmp_path: Path) -> None:
    hostile = '${HOME}/a "b" `touch pwned` $(touch pwned) $HOME \\ ${NEVER_SET}'
    own = EnvVar(name="A", value=hostile, reason="", origin="environment.variables")
    carried = EnvVar(name="B", value="${HOME}", reason="", origin="environment.forward")
    text = render_env_sh([own, carried], secret_names=(), secrets_path="/nowhere")
    arrived = _what_arrives(text, ["A", "B"], tmp_path)
    assert arrived == {"A": f'{tmp_path}/a "b" `touch pwned` $(touch pwned) $HOME \\ ', "B": "${HOME}"}
    assert not (tmp_path / "pwned").exists()


def test_each_node_expands_for_itself() -> None:
    values = {"CACHE": "${SCRATCH}/triton", "BELOW": "${CACHE}/x", "PATH": "/x:${PATH}", "LOST": "${NEVER_SET}/a"}
    env = [EnvVar(name=n, value=v, reason="", origin="environment.variables") for n, v in values.items()]
    # As the task inherits them from the first node, where env.sh has expanded them.
    environ = {"SCRATCH": "/local/2", "CACHE": "/local/1/triton", "PATH": "/x:/bin", "LOST": "/a"}
    found, problems = expand_on_node(env, environ)
    assert found == {"CACHE": "/local/2/triton", "BELOW": "/local/2/triton/x", "LOST": None}
    assert problems == ["environment.variables.LOST: ${NEVER_SET} is not set on this node"]


def test_a_reason_cannot_leave_its_comment(tmp_path: Path) -> None:
    env = [EnvVar(name="A", value="1", reason="first\ntouch pwned\n$(touch pwned)", origin="x\ntouch pwned")]
    _what_arrives(render_env_sh(env, secret_names=(), secrets_path="/nowhere"), ["A"], tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_every_export_is_under_its_reason_and_origin() -> None:
    text = render_env_sh(
        [EnvVar(name="A", value="1", reason="Because.", origin="jobs/x.yaml")], secret_names=(), secrets_path="/n"
    )
    assert "# Because. [jobs/x.yaml]\nexport A=1\n" in text


def test_secrets_arrive_by_sourcing_their_file_and_are_not_in_env_sh(tmp_path: Path) -> None:
    folder = tmp_path / "a 'run' $(x)"
    folder.mkdir()
    secrets = {"HF_TOKEN": "tok'en $(touch pwned)", "WANDB_API_KEY": "two\nlines"}
    (folder / "secrets.env").write_text(render_secrets_env(secrets), encoding="utf-8")
    text = render_env_sh([], secret_names=list(secrets), secrets_path=folder / "secrets.env")
    assert not any(value in text for value in secrets.values())
    assert _what_arrives(text, list(secrets), tmp_path) == secrets


def test_a_missing_secrets_file_stops_the_script(tmp_path: Path) -> None:
    script = tmp_path / "env.sh"
    script.write_text(render_env_sh([], secret_names=["HF_TOKEN"], secrets_path=tmp_path / "secrets.env"))
    done = subprocess.run(
        ["bash", "-euc", f". {script}; echo went on"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode != 0
    assert "secrets.env" in done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize("value", HOSTILE)
def test_secrets_env_is_read_back_as_it_was(value: str) -> None:
    secrets = {"A_TOKEN": value, "B_KEY": "x"}
    assert parse_secrets_env(render_secrets_env(secrets)) == secrets


def test_env_sh_refuses_to_hold_a_secret() -> None:
    with pytest.raises(ValueError, match="HF_TOKEN"):
        render_env_sh([EnvVar(name="HF_TOKEN", value="x", reason="", origin="")], secret_names=(), secrets_path="/n")


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "my_token", "TOKEN"])
def test_a_secret_in_environment_variables_is_refused_without_showing_it(name: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        resolve_env(PROFILE, {name: "hunter2"}, {})
    assert "forward" in (caught.value.hint or "")
    assert "hunter2" not in f"{caught.value.message}{caught.value.hint}"


def test_a_password_inside_a_url_counts_as_secret() -> None:
    proxy = "http://me:hunter2@proxy:3128"
    plain, secret = split_secrets({"HTTPS_PROXY": proxy, "HTTP_PROXY": "http://proxy:3128", "LANG": "C"})
    assert secret == {"HTTPS_PROXY": proxy}
    assert plain == {"HTTP_PROXY": "http://proxy:3128", "LANG": "C"}
    with pytest.raises(UsageError, match="HTTPS_PROXY"):
        resolve_env(PROFILE, {"HTTPS_PROXY": proxy}, {})


def test_the_jobs_own_value_wins_and_the_reason_names_the_profiles() -> None:
    env = {v.name: v for v in resolve_env(PROFILE, {"NCCL_DEBUG": "INFO", "MINE": "1"}, {})}
    assert (env["NCCL_DEBUG"].value, env["NCCL_DEBUG"].origin) == ("INFO", "environment.variables")
    assert "'WARN'" in env["NCCL_DEBUG"].reason
    assert env["MINE"].origin == "environment.variables"


def test_a_null_entry_is_not_exported_unless_the_job_sets_it() -> None:
    assert "NCCL_IB_HCA" not in {v.name for v in resolve_env(PROFILE, {}, {})}
    env = {v.name: v for v in resolve_env(PROFILE, {"NCCL_IB_HCA": "=mlx5_0:1"}, {})}
    assert env["NCCL_IB_HCA"].value == "=mlx5_0:1"
    assert "found on the node" in env["NCCL_IB_HCA"].reason


def test_forwarded_values_win_over_the_profile_and_secrets_stay_out() -> None:
    env = {v.name: v for v in resolve_env(PROFILE, {}, {"NCCL_DEBUG": "TRACE", "HF_TOKEN": "s"})}
    assert (env["NCCL_DEBUG"].value, env["NCCL_DEBUG"].origin) == ("TRACE", "environment.forward")
    assert "HF_TOKEN" not in env


def test_a_name_that_is_both_set_and_forwarded_is_refused() -> None:
    with pytest.raises(UsageError, match="only one of them"):
        resolve_env(PROFILE, {"A": "1"}, {"A": "2"})


@pytest.mark.parametrize(("cpus", "threads"), [(None, "8"), (16, "8"), (8, "8"), (7, "7"), (1, "1"), (0, "1")])
def test_threads_are_limited_by_the_cpus_of_a_rank(cpus: int | None, threads: str) -> None:
    env = {v.name: v.value for v in resolve_env(PROFILE, {}, {}, cpus_per_process=cpus)}
    assert env["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    "line", ["export HF_TOKEN=abc", "HF_TOKEN='abc' ./login", "export A=1 WANDB_API_KEY=abc", "x\x07y", "a\rb"]
)
def test_setup_lines_with_a_secret_or_a_control_character_are_refused(line: str) -> None:
    with pytest.raises(UsageError, match=r"environment\.setup, line 2"):
        check_setup(["module load cuda", line], key="environment.setup")


@pytest.mark.parametrize(
    "line",
    ["module load cuda/12.8", "export HF_TOKEN=$(cat ~/.hf)", 'export HF_TOKEN="$TOKEN_FILE"', "a=1\nb=2", "KEY="],
)
def test_ordinary_setup_lines_are_accepted(line: str) -> None:
    check_setup([line], key="environment.setup")


@pytest.mark.parametrize("name", profile_names("env"))
def test_every_profile_entry_has_name_value_reason_and_source_once(name: str) -> None:
    entries = load_env_profile(name)
    assert len({e["name"] for e in entries}) == len(entries)
    for entry in entries:
        assert set(entry) - {"limit"} == {"name", "value", "reason", "source", "origin"}
        assert entry["value"] is None or isinstance(entry["value"], str), entry["name"]
        assert len(entry["reason"]) > 8 and entry["source"]


def test_the_legacy_profile_has_the_old_settings() -> None:
    legacy = {e["name"]: e["value"] for e in load_env_profile("janusvln-legacy")}
    assert legacy["NCCL_IB_TIMEOUT"] == "22"
    assert legacy["NCCL_NTHREADS"] == "640"
    assert legacy["NCCL_BUFFSIZE"] == "8388608"
    assert legacy["TORCH_DISTRIBUTED_DEBUG"] == "DETAIL"


def test_an_unknown_profile_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="there is no profile 'h801-ib'; did you mean h800-ib") as caught:
        load_env_profile("h801-ib")
    assert "h800-ib" in (caught.value.hint or "")
