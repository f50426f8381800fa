from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job import sbatch_names
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.sbatch_options import resolve_sbatch_options
from janus_cluster.job.schema import JobConfig

RUN = Path("/shared/runs/r")


def _options(slurm: dict[str, Any] | None = None, **job: Any) -> dict[str, str | None]:
    return resolve_sbatch_options(JobConfig(name="j", slurm=slurm or {}, **job), run_dir=RUN)


def _refused(slurm: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        _options(slurm)
    return caught.value.message


def test_defaults_ask_for_whole_nodes_with_their_gpus() -> None:
    assert _options(nodes=2) == {
        "job-name": "j",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gres": "gpu:h800:8",
        "exclusive": None,
        "mem": "0",
        "time": "24:00:00",
        "output": "/shared/runs/r/logs/batch.log",
        "open-mode": "append",
        "requeue": None,
        "signal": "B:USR1@300",
        "export": "NONE",
    }


@pytest.mark.parametrize(
    ("hardware", "gres"),
    [
        ({"gpus_per_node": 0}, None),
        ({"gpus_per_node": 4, "gpu_type": ""}, "gpu:4"),
        ({"gpus_per_node": 4, "gpu_type": "a100"}, "gpu:a100:4"),
    ],
)
def test_gres_follows_the_hardware(hardware: dict[str, Any], gres: str | None) -> None:
    assert _options(hardware=hardware).get("gres") == gres


@pytest.mark.parametrize(
    ("key", "value", "name", "text"),
    [
        ("partition", "h800", "partition", "h800"),
        ("mail_type", ["END", "FAIL"], "mail-type", "END,FAIL"),
        ("mail-type", "ALL", "mail-type", "ALL"),
        ("mem", 0, "mem", "0"),
        ("cpus_per_task", 64, "cpus-per-task", "64"),
        ("exclusive", "user", "exclusive", "user"),
        ("exclusive", True, "exclusive", None),
        ("contiguous", True, "contiguous", None),
        ("nice", 100, "nice", "100"),
        ("time", "2-12", "time", "2-12"),
        ("kill_on_invalid_dep", "yes", "kill-on-invalid-dep", "yes"),
        ("comment", 'it\'s 100% "fun" \\o/', "comment", 'it\'s 100% "fun" \\o/'),
        ("signal", "B:USR1@600", "signal", "B:USR1@600"),
        ("job-name", "other", "job-name", "other"),
    ],
)
def test_any_option_is_taken_under_its_own_name(key: str, value: Any, name: str, text: str | None) -> None:
    options = _options({key: value})
    assert name in options and options[name] == text


@pytest.mark.parametrize("name", ["exclusive", "requeue", "signal", "gres", "time"])
def test_false_leaves_a_default_out(name: str) -> None:
    assert name not in _options({name: False})


@pytest.mark.parametrize(
    ("text", "gres"),
    [("cpu:16", "gpu:h800:8"), ("cpu=16", "gpu:h800:8"), ("cpu=16,gres/gpu=8", None), ("gres/gpu:h800:8", None)],
)
def test_gpus_stay_asked_for_beside_a_tres_that_has_none(text: str, gres: str | None) -> None:
    assert _options({"tres_per_task": text}).get("gres") == gres


@pytest.mark.parametrize(
    ("slurm", "line"),
    [
        ({"requeue": "expedite"}, ("requeue", "expedite")),
        ({"resv_ports": True}, ("resv-ports", None)),
        ({"resources": "x"}, ("resources", "x")),
        ({"mem_update": "1G"}, ("mem-update", "1G")),
        ({"container_type": "oci"}, ("container-type", "oci")),
    ],
)
def test_options_of_newer_versions_are_known(slurm: dict[str, Any], line: tuple[str, str | None]) -> None:
    assert line in _options(slurm).items()


def test_a_plugins_options_are_passed_on_as_written() -> None:
    extra = ["--container-image=/a b#c", "--uenv=x:y", "--x11"]
    job = JobConfig(name="j", slurm_extra=extra, srun_extra=["--container-mounts=/a:/b"])
    options = resolve_sbatch_options(job, run_dir=Path("/runs/j"))
    assert {"container-image": "/a b#c", "uenv": "x:y", "x11": None}.items() <= options.items()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"slurm_extra": ["--partition=x"]}, "use slurm.partition"),
        ({"slurm_extra": ["--output=x"]}, "use slurm.output"),
        ({"slurm_extra": ["-p x"]}, "allowed: --name"),
        ({"slurm_extra": ["--a=1\n--b"]}, "on one line"),
        ({"slurm_extra": ["--uenv=1", "--uenv=2"]}, "given twice"),
        ({"srun_extra": ["container"]}, "srun_extra"),
    ],
)
def test_what_cannot_be_passed_on_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        resolve_sbatch_options(JobConfig(name="j", **keys), run_dir=Path("/runs/j"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(["rack1|rack2"], "[rack1|rack2]"), (["a", "b"], "a,b"), (["a"], "a"), ("[a*2&b*1]", "[a*2&b*1]")],
)
def test_a_constraint_keeps_slurms_own_brackets(value: object, text: str) -> None:
    assert _options({"constraint": value})["constraint"] == text


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_value_means_not_given(value: str | None) -> None:
    options = _options({"partition": value, "time": value})
    assert "partition" not in options and options["time"] == "24:00:00"


@pytest.mark.parametrize(
    ("slurm", "gone"),
    [
        ({"no_requeue": True}, "requeue"),
        ({"oversubscribe": True}, "exclusive"),
        ({"gpus_per_node": "h800:8"}, "gres"),
        ({"gpus": 16}, "gres"),
        ({"mem_per_gpu": "200G"}, "mem"),
        ({"exclusive": False}, "mem"),
        ({"oversubscribe": True}, "mem"),
    ],
)
def test_an_option_takes_the_place_of_the_default_it_contradicts(slurm: dict[str, Any], gone: str) -> None:
    assert gone not in _options(slurm, nodes=2)


@pytest.mark.parametrize("value", ["NONE", "NIL", "ALL"])
def test_a_site_whose_slurmd_cannot_fetch_an_environment_has_a_way_out(value: str) -> None:
    assert _options({"export": value})["export"] == value


def test_the_users_own_memory_stays_on_a_shared_node() -> None:
    assert _options({"mem": "500G", "exclusive": False})["mem"] == "500G"


@pytest.mark.parametrize(
    ("slurm", "expected_text"),
    [
        ({"partiton": "x"}, ["slurm.partiton", "did you mean partition"]),
        ({"mailtype": "x"}, ["did you mean mail-type"]),
        ({"p": "x"}, ["slurm.p", "-p is 'partition'"]),
        ({"xyzzy": "x"}, ["slurm.xyzzy", "no option of this name"]),
        ({"nodes": 2}, ["slurm.nodes", "own key nodes"]),
        ({"output": "/x"}, ["slurm.output", "logs/batch.log"]),
        ({"error": "/x"}, ["logs/batch.log"]),
        ({"array": "0-3"}, ["slurm.array"]),
        ({"wrap": "x"}, ["job.sbatch"]),
        ({"parsable": True}, ["--json"]),
        ({"test_only": True}, ["--dry-run"]),
        ({"wait": True}, ["--follow"]),
        ({"export": "ALL,A=1"}, ["slurm.export", "NONE, NIL, ALL", "environment.variables or .forward"]),
        ({"export_file": "x"}, ["environment.variables or .forward"]),
        ({"ntasks_per_node": 8}, ["processes_per_node"]),
        ({"partition": True}, ["slurm.partition", "needs a value"]),
        ({"hold": "yes"}, ["switch", "true, false"]),
        ({"comment": "two\nlines"}, ["'\\n'"]),
        ({"comment": "bell\x07"}, ["not possible"]),
        ({"time": "soon"}, ["slurm.time", "HH:MM:SS"]),
        ({"time": 0}, ["UNLIMITED"]),
        ({"signal": "USR2@90"}, ["B:USR1@"]),
        ({"open-mode": "truncate"}, ["append"]),
        ({"gres": "gpu:h800:4"}, ["asks for 4 GPUs", "hardware.gpus_per_node is 8"]),
        ({"tres_per_task": "cpu=16,gres/gpu=4"}, ["slurm.tres-per-task", "asks for 4 GPUs"]),
        ({"tres_per_task": "cpu:16,gres/gpu:h800:4"}, ["slurm.tres-per-task", "asks for 4 GPUs"]),
        ({"external": True}, ["nothing would run"]),
        ({"tasks_per_node": 8}, ["processes_per_node"]),
        ({"cluster": "beta"}, ["SLURM_CLUSTERS"]),
        ({"gpus_per_node": 4}, ["asks for 4 GPUs"]),
        ({"gpus": 4}, ["slurm.gpus", "asks for 4 GPUs"]),
        ({"clusters": "other"}, ["slurm.clusters", "SLURM_CLUSTERS"]),
        ({"mail_type": "A", "mail-type": "B"}, ["given twice"]),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(slurm: dict[str, Any], expected_text: list[str]) -> None:
    message = _refused(slurm)
    assert all(part in message for part in expected_text), message


def test_all_problems_are_listed_together() -> None:
    message = _refused({"partiton": "x", "time": "soon", "nodes": 2})
    assert message.startswith("3 problems")


@pytest.mark.parametrize(
    "gres", ["gpu:h800:8", "gpu:8", "gpu:h800:8,shard:2", "gres/gpu:8", "gpu:h800:8(S:0-1)", "lustre:1"]
)
def test_a_gres_that_gives_the_gpus_is_accepted(gres: str) -> None:
    assert _options({"gres": gres})["gres"] == gres


@pytest.mark.parametrize("run_dir", ["/s/a\\b", "/s/a\nb", "/s/a\x1bb", "/s/\udc80"])
def test_a_run_folder_that_slurm_cannot_log_to_is_refused(run_dir: str) -> None:
    with pytest.raises(UsageError, match="run folder"):
        resolve_sbatch_options(JobConfig(name="j"), run_dir=Path(run_dir))


def test_a_percent_sign_in_the_run_folder_is_no_pattern() -> None:
    options = resolve_sbatch_options(JobConfig(name="j"), run_dir=Path("/s/100%j"))
    assert options["output"] == "/s/100%%j/logs/batch.log"


def test_option_kinds_do_not_overlap_and_short_names_lead_to_known_ones() -> None:
    kinds = [
        sbatch_names.SWITCHES,
        sbatch_names.SWITCH_OR_VALUE,
        sbatch_names.WITH_VALUE,
        frozenset(sbatch_names.OWNED),
    ]
    assert sum(map(len, kinds)) == len(sbatch_names.ALL)
    assert set(sbatch_names.SHORT.values()) <= sbatch_names.ALL


@pytest.mark.slurm
def test_every_option_of_the_installed_sbatch_is_known(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"  # sbatch will not even print its help without one
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n\nPartitionName=p Nodes=n\n")
    environ = os.environ | {"SLURM_CONF": str(conf)}
    done = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, timeout=600, env=environ, check=True)
    named = set(re.findall(r"--([a-z][a-z0-9-]+)", done.stdout))
    assert len(named) > 80
    assert named - sbatch_names.ALL == set()


def test_shipped_jobs_are_accepted(resolve: Callable[..., ResolvedJob]) -> None:
    assert resolve("train_2node").sbatch_options["comment"] == "JanusVLN training"


@pytest.mark.parametrize("shares", ["slurm.exclusive=false", "slurm.exclusive=user", "slurm.oversubscribe=true"])
def test_a_shared_node_without_cpus_is_warned_of(resolve: Callable[..., ResolvedJob], shares: str) -> None:
    (warning,) = [w for w in resolve("demo", sets=[shares, "data.num_workers=3"]).warnings if "CPU" in w]
    assert "--set slurm.cpus-per-task=4" in warning
    for cpus in ("slurm.cpus-per-task=4", "slurm.cpus-per-gpu=1", "slurm.tres-per-task=cpu=4"):
        assert not [w for w in resolve("demo", sets=[shares, cpus]).warnings if "one CPU" in w]
    assert not [w for w in resolve("demo").warnings if "one CPU" in w]
