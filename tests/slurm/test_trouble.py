"""Faults of Slurm itself, recognised in what its programs print."""

from __future__ import annotations

import pytest

from janus_cluster.slurm.trouble import find_trouble

NO_CONFIGURATION = """squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
squeue: error: fetch_config: DNS SRV lookup failed
squeue: error: _establish_config_source: failed to fetch config
squeue: fatal: Could not establish a configuration source"""
NO_MUNGE = """squeue: error: If munged is up, restart with --num-threads=10
squeue: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory
squeue: error: slurm_send_node_msg: auth_g_create: REQUEST_JOB_INFO has authentication error
slurm_load_jobs error: Protocol authentication error"""
OTHER_KEY = """squeue: error: auth_g_verify: REQUEST_JOB_INFO has authentication error: Invalid credential
slurm_load_jobs error: Protocol authentication error"""


@pytest.mark.parametrize(
    ("message", "cause", "remedy"),
    [
        (NO_CONFIGURATION, "no configuration", "SLURM_CONF"),
        ("squeue: fatal: Unable to process configuration file", "no configuration", "SLURM_CONF"),
        (NO_MUNGE, "munge does not run", "munge -n"),
        (OTHER_KEY, "credentials", "keys or the clocks"),
        ("slurm_load_jobs error: Zero Bytes were transmitted or received", "does not answer", "scontrol ping"),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "does not answer", "ping"),
        ("scontrol: Unexpected message received for job 7", "does not answer", "scontrol ping"),
        ("slurm_load_jobs error: Incompatible versions of client and server code", "version", "sinfo --version"),
    ],
)
def test_each_fault_has_its_cause_and_what_to_type(message: str, cause: str, remedy: str) -> None:
    trouble = find_trouble(message)
    assert trouble is not None
    assert cause in trouble.cause and remedy in trouble.remedy


@pytest.mark.parametrize(
    "message",
    [
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
        "slurm_load_jobs error: Invalid job id specified",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit",
        "scancel: error: Kill job error on job id 7: Access/permission denied",
    ],
)
def test_a_message_about_a_job_is_none_of_them(message: str) -> None:
    assert find_trouble(message) is None
