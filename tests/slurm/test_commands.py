"""Parsers are fed what Slurm 22.05 printed; the programs themselves are real ones or stand-ins on PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from janus_cluster.errors import JanusError, JobNotFound, SlurmUnavailable
from janus_cluster.slurm.commands import (
    Slurm,
    has_gpus,
    parse_exit_code,
    parse_hostlist,
    parse_sacct,
    parse_scontrol_job,
    parse_squeue,
    parse_time,
)

# Captured: a two-node run, a cancelled, a failed, a killed, a finished and a held job, in one answer.
SQUEUE = (
    "23\x1fCANCELLED\x1f15\x1f0\x1fh800-02\x1f1795234092\x1f1795234089\x1fNone\x1f/runs/a/job.sbatch\x1fj\x1f\n"
    "22\x1fCOMPLETED\x1f0\x1f0\x1fh800-01\x1f1795234092\x1f1795234089\x1fNone\x1f/runs/b/job.sbatch\x1fok\x1f\n"
    "20\x1fFAILED\x1f1792\x1f0\x1fh800-01\x1f1795234089\x1f1795234089\x1fNonZeroExitCode\x1f/runs/c/job.sbatch\x1ff\x1f\n"
    "21\x1fFAILED\x1f9\x1f0\x1fh800-02\x1f1795234089\x1f1795234089\x1fJobLaunchFailure\x1f/runs/d/job.sbatch\x1fs\x1f\n"
    "25\x1fPENDING\x1f0\x1f0\x1f\x1fN/A\x1f1795234091\x1fJobHeldUser\x1f/runs/e/job.sbatch\x1fj\x1f\n"
    "24\x1fRUNNING\x1f0\x1f1\x1fh800-[01-02]\x1f1795234095\x1f1795234091\x1fNone\x1f/runs/f g/job.sbatch 300\x1f"
    'we|ird "n=a me\x1f\n'
)
SACCT = (
    "20\x1fFAILED\x1f7:0\x1fh800-01\x1f1795234089\x1f1795234089\x1fNone\x1ffail.sbatch\n"
    "21\x1fFAILED\x1f0:9\x1fh800-02\x1f1795234089\x1f1795234089\x1fNone\x1fsig.sbatch\n"
    "23\x1fCANCELLED by 1000\x1f0:0\x1fh800-02\x1f1795234092\x1f1795234089\x1fNone\x1fj\n"
    "9\x1fNODE_FAIL\x1f0:0\x1fh800-[01-02]\x1f1795233128\x1f1795233090\x1fNone\x1fj\n"
    "15\x1fDEADLINE\x1f1:0\x1fNone assigned\x1fNone\x1f1795233237\x1fNone\x1fj\n"
)
SCONTROL = """JobId=19 JobName=j
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901741 Nice=0 Account=root QOS=normal
   JobState=TIMEOUT Reason=TimeLimit Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:15
   RunTime=00:01:26 TimeLimit=00:01:00 TimeMin=N/A
   SubmitTime=1795233890 EligibleTime=1795233890
   AccrueTime=1795233890
   StartTime=1795233891 EndTime=1795233977 Deadline=N/A
   PreemptEligibleTime=1795233891 PreemptTime=None
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=1795233891 Scheduler=Main
   Partition=main AllocNode:Sid=localhost:16509
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=h800-01
   BatchHost=h800-01
   NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=1,mem=20000M,node=1,billing=1
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=/runs/a b/job.sbatch 303
   WorkDir=/runs/a b
   StdErr=/runs/19.out
   StdIn=/dev/null
   StdOut=/runs/19.out
   Power=
"""


def put_program(folder: Path, name: str, body: str) -> None:
    """Write a Python program of that name into `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds only the programs which a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_squeue_distinguishes_failed_exit_codes_from_signals() -> None:
    jobs = parse_squeue(SQUEUE)
    assert (jobs["20"].state, jobs["20"].exit_code, jobs["20"].signal) == ("FAILED", 7, None)
    assert (jobs["21"].exit_code, jobs["21"].signal, jobs["21"].reason) == (0, 9, "JobLaunchFailure")
    assert (jobs["22"].state, jobs["22"].exit_code, jobs["22"].reason) == ("COMPLETED", 0, None)


def test_squeue_names_nodes_times_and_hostile_job_names() -> None:
    job = parse_squeue(SQUEUE)["24"]
    assert job.nodes == ("h800-01", "h800-02")
    assert (job.start_time, job.submit_time, job.restarts) == (1795234095.0, 1795234091.0, 1)
    assert job.name == 'we|ird "n=a me'
    assert job.command == "/runs/f g/job.sbatch 300"


def test_squeue_pending_has_no_nodes_and_no_start() -> None:
    job = parse_squeue(SQUEUE)["25"]
    assert (job.state, job.reason, job.nodes, job.start_time) == ("PENDING", "JobHeldUser", (), None)


@pytest.mark.parametrize("text", ["", "\n", "slurm_load_jobs error: Invalid job id specified\n", "1\x1fRUNNING\n"])
def test_squeue_text_without_jobs_holds_none(text: str) -> None:
    assert parse_squeue(text) == {}


def test_sacct_cancelled_by_a_user_is_cancelled() -> None:
    job = parse_sacct(SACCT)["23"]
    assert (job.state, job.reason) == ("CANCELLED", "cancelled by user id 1000")


def test_sacct_reads_node_fail_and_unassigned_nodes() -> None:
    jobs = parse_sacct(SACCT)
    assert (jobs["9"].state, jobs["9"].nodes) == ("NODE_FAIL", ("h800-01", "h800-02"))
    assert (jobs["15"].state, jobs["15"].nodes, jobs["15"].start_time) == ("DEADLINE", (), None)
    assert (jobs["21"].exit_code, jobs["21"].signal) == (0, 9)


def test_sacct_last_row_of_a_requeued_job_counts() -> None:
    text = SACCT.splitlines()[3] + "\n" + SACCT.splitlines()[3].replace("NODE_FAIL", "COMPLETED") + "\n"
    assert parse_sacct(text)["9"].state == "COMPLETED"


def test_scontrol_reads_every_field_it_is_asked_for() -> None:
    job = parse_scontrol_job(SCONTROL)
    assert job is not None
    assert (job.job_id, job.state, job.reason, job.name) == ("19", "TIMEOUT", "TimeLimit", "j")
    assert (job.exit_code, job.signal, job.restarts) == (0, 15, 0)
    assert (job.start_time, job.submit_time) == (1795233891.0, 1795233890.0)
    assert job.nodes == ("h800-01",)
    assert job.command == "/runs/a b/job.sbatch 303"


def test_scontrol_job_name_cannot_pretend_to_be_a_state() -> None:
    job = parse_scontrol_job(SCONTROL.replace("JobName=j", "JobName=x JobState=COMPLETED Reason=None"))
    assert job is not None
    assert job.state == "TIMEOUT"


def test_scontrol_error_text_holds_no_job() -> None:
    assert parse_scontrol_job("slurm_load_jobs error: Invalid job id specified\n") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", (0, None)),
        ("1792", (7, None)),
        ("9", (0, 9)),
        ("7:0", (7, None)),
        ("0:125", (0, 125)),
        ("", (None, None)),
        ("n/a", (None, None)),
    ],
)
def test_exit_code_is_read_in_both_notations(text: str, expected: tuple[int | None, int | None]) -> None:
    assert parse_exit_code(text) == expected


def test_times_are_read_as_epoch_and_as_iso(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_time("1795233047") == 1795233047.0
    assert parse_time("2026-11-21T03:50:47") is not None
    assert parse_time("N/A") is None
    assert parse_time("Unknown") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h800-[01-02]", ("h800-01", "h800-02")),
        ("h800-[08-10,12],login", ("h800-08", "h800-09", "h800-10", "h800-12", "login")),
        ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
        ("single", ("single",)),
        ("", ()),
        ("None assigned", ()),
        ("(null)", ()),
    ],
)
def test_hostlist_is_expanded(text: str, expected: tuple[str, ...]) -> None:
    assert parse_hostlist(text) == expected


def test_no_slurm_names_both_ways_out(bin_dir: Path) -> None:
    with pytest.raises(SlurmUnavailable) as caught:
        Slurm().squeue(["1"])
    assert "no squeue on PATH" in caught.value.message
    assert "--cluster local" in (caught.value.hint or "")
    assert "--cluster sandbox" in (caught.value.hint or "")


def test_no_job_ids_need_no_slurm(bin_dir: Path) -> None:
    assert Slurm().squeue([]) == {}
    assert Slurm().sacct([]) == {}


def test_no_sacct_program_is_no_accounting(bin_dir: Path) -> None:
    assert Slurm().sacct(["1"]) == {}


def test_disabled_accounting_knows_no_jobs(bin_dir: Path) -> None:
    put_program(bin_dir, "sacct", "sys.exit('Slurm accounting storage is disabled')")
    assert Slurm().sacct(["1"]) == {}


def test_silent_controller_is_given_up_on(bin_dir: Path) -> None:
    put_program(bin_dir, "squeue", "time.sleep(60)")
    with pytest.raises(SlurmUnavailable, match="no answer within"):
        Slurm(timeout_s=0.3).squeue(["1"])


def test_unreachable_controller_is_slurm_unavailable_with_its_message(bin_dir: Path) -> None:
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    put_program(bin_dir, "squeue", f"sys.exit({words!r})")
    with pytest.raises(SlurmUnavailable, match="connect failure"):
        Slurm().squeue(["1"])


def test_other_failures_keep_their_message(bin_dir: Path) -> None:
    put_program(bin_dir, "squeue", "sys.exit('squeue: error: Unrecognized option')")
    with pytest.raises(JanusError, match="Unrecognized option") as caught:
        Slurm().squeue(["1"])
    assert not isinstance(caught.value, SlurmUnavailable)


def test_forgotten_job_is_no_error(bin_dir: Path) -> None:
    words = "slurm_load_jobs error: Invalid job id specified"
    put_program(bin_dir, "squeue", f"sys.exit({words!r})")
    put_program(bin_dir, "scontrol", f"sys.exit({words!r})")
    assert Slurm().squeue(["1"]) == {}
    assert Slurm().scontrol_show_job("1") is None
    with pytest.raises(JobNotFound):
        Slurm().requeue("1")


@pytest.mark.parametrize("kept", [-2, -20])
def test_an_answer_of_squeue_that_was_cut_is_no_answer(bin_dir: Path, kept: int) -> None:
    put_program(bin_dir, "squeue", f"sys.stdout.write({SQUEUE!r}[:{kept}])")
    with pytest.raises(JanusError, match="was cut"):
        Slurm().squeue(["20", "24"])


def test_lines_of_a_sites_wrapper_are_no_cut_rows(bin_dir: Path) -> None:
    put_program(bin_dir, "squeue", f"sys.stdout.write('Maintenance on Monday\\n' + {SQUEUE!r})")
    assert set(Slurm().squeue(["20", "24"])) >= {"20", "24"}


def test_an_answer_of_scontrol_without_the_job_does_not_deny_it(bin_dir: Path) -> None:
    put_program(bin_dir, "scontrol", "print('JobId=1')")
    with pytest.raises(JanusError, match="holds no job 1"):
        Slurm().scontrol_show_job("1")


def test_usable_nodes_are_listed_with_their_gres(bin_dir: Path) -> None:
    rows = "n1 idle gpu:h800:8(S:0-1)\\nn2 drained* gpu:h800:8\\nn3 mixed- (null)\\nn4 down$ (null)"
    put_program(bin_dir, "sinfo", f"print('{rows}')")
    assert Slurm().usable_nodes("gpu") == {"n1": "gpu:h800:8(S:0-1)", "n3": "(null)"}


@pytest.mark.parametrize(
    ("gres", "gpu_type", "has"),
    [
        ("gpu:h800:8(S:0-1)", "h800", True),
        ("shard:80,gpu:H800:8", "h800", True),
        ("gpu:8", "h800", True),
        ("gpu:a100:8", "", True),
        ("gpu:a100:8", "h800", False),
        ("gpu:a100:4,gpu:h800:4", "h800", True),
        ("(null)", "h800", False),
        ("", "", False),
    ],
)
def test_a_gres_has_gpus_of_a_type_or_not(gres: str, gpu_type: str, has: bool) -> None:
    assert has_gpus(gres, gpu_type) is has


def test_a_nodes_address_is_found(bin_dir: Path) -> None:
    put_program(
        bin_dir, "scontrol", "print('NodeName=n1 Arch=x86_64\\n   NodeAddr=10.0.0.1 NodeHostName=n1 Version=22.05')"
    )
    assert Slurm().node_address("n1") == "10.0.0.1"


def test_programs_get_the_conf_and_no_filters_of_the_user(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    seen = tmp_path / "seen"
    put_program(bin_dir, "squeue", f"open({str(seen)!r}, 'w').write(repr((dict(os.environ), sys.argv)))")
    (tmp_path / "slurm.conf").write_text("ClusterName=x\n")
    Slurm(conf=tmp_path / "slurm.conf").squeue(["7", "8"])
    text = seen.read_text()
    assert f"'SLURM_CONF': '{tmp_path}/slurm.conf'" in text
    assert "'SLURM_TIME_FORMAT': '%s'" in text
    assert "SQUEUE_USERS" not in text
    assert "'--jobs=7,8'" in text
    assert os.environ["SQUEUE_USERS"] == "nobody"


def test_slurm_that_was_taken_down_is_reported_at_once(tmp_path: Path) -> None:
    slurm = Slurm(conf=tmp_path / "gone" / "slurm.conf")
    with pytest.raises(SlurmUnavailable, match="was taken down"):
        slurm.squeue(["1"])


def test_scancel_sends_the_signal_it_is_given(bin_dir: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    put_program(bin_dir, "scancel", f"open({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))")
    Slurm().scancel("7", signal="USR1")
    assert seen.read_text() == "--signal=USR1 7"
