"""Slurm's reasons of a waiting job: whether it will start, and what to type."""

from __future__ import annotations

import pytest

from janus_cluster.slurm.pending import read_reason


@pytest.mark.parametrize(
    ("reason", "outlook", "command"),
    [
        (None, "waits", ""),
        ("Priority", "waits", ""),
        ("Resources", "waits", ""),
        ("BeginTime", "waits", ""),
        ("Dependency", "waits", ""),
        ("ReqNodeNotAvail, May be reserved for other job", "waits", ""),
        ("QOSMaxJobsPerUserLimit", "limit", "squeue --me"),
        ("AssocGrpGRES", "limit", "squeue --me"),
        ("AssocMaxJobsLimit", "limit", "squeue --me"),
        ("Licenses", "limit", "squeue --me"),
        ("DependencyNeverSatisfied", "never", "scancel 7"),
        ("JobHeldUser", "never", "scontrol release 7"),
        ("JobHeldAdmin", "never", "ask the administrators"),
        ("launch failed requeued held", "never", "scontrol release 7"),
        ("BadConstraints", "never", "scancel 7"),
        ("PartitionTimeLimit", "never", "scancel 7"),
        ("PartitionConfig", "never", "scancel 7"),
        ("QOSUsageThreshold", "limit", "squeue --me"),
        ("PartitionNodeLimit", "never", "scancel 7"),
        ("QOSMaxWallDurationPerJobLimit", "never", "scancel 7"),
        ("AssocMaxWallDurationPerJobLimit", "never", "scancel 7"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in other partitions", "waits", "sinfo -R"),
    ],
)
def test_a_reason_has_its_outlook_and_its_command(reason: str | None, outlook: str, command: str) -> None:
    pending = read_reason(reason, job_id="7")
    assert pending.outlook == outlook
    assert command in pending.command and bool(pending.command) == bool(command) == bool(pending.meaning)


@pytest.mark.parametrize(
    ("reason", "is_alone"),
    [("DependencyNeverSatisfied", True), ("JobHeldUser", True), ("JobHeldAdmin", False), ("PartitionDown", False)],
)
def test_what_only_the_user_can_end_is_known(reason: str, is_alone: bool) -> None:
    assert read_reason(reason, job_id="7").is_for_user_alone is is_alone
