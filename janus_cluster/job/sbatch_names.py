"""The long options of sbatch 22.05 to 26.05, by kind, and those that a job file may not set. Data only."""

from __future__ import annotations

# fmt: off
SWITCHES = frozenset([
    "consolidate-segments", "contiguous", "hold", "ignore-pbs", "no-requeue", "overcommit", "oversubscribe", "reboot",
    "spread-job", "spread-segments", "stepmgr", "use-min-nodes",
])
SWITCH_OR_VALUE = frozenset(["exclusive", "nice", "no-kill", "oom-kill-step", "propagate", "requeue", "resv-ports"])
WITH_VALUE = frozenset([
    "account", "acctg-freq", "batch", "bb", "bbf", "begin", "chdir", "cluster-constraint", "comment", "constraint",
    "container", "container-id", "container-type", "core-spec", "cores-per-socket", "cpu-freq", "cpus-per-gpu",
    "cpus-per-task", "deadline", "delay-boot", "dependency", "distribution", "exclude", "export", "extra",
    "extra-node-info", "gid", "gpu-bind", "gpu-freq", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task",
    "gres", "gres-flags", "hint", "job-name", "kill-on-invalid-dep", "licenses", "mail-type", "mail-user",
    "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mem-update", "mincpus", "network", "nodefile",
    "nodelist", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket", "open-mode", "partition", "power",
    "prefer", "priority", "profile", "qos", "reservation", "resources", "segment", "signal", "sockets-per-node",
    "switches", "thread-spec", "threads-per-core", "time", "time-min", "tmp", "tres-bind", "tres-per-task", "uid",
    "wait-all-nodes", "wckey",
])
SHORT = {
    "A": "account", "B": "extra-node-info", "C": "constraint", "D": "chdir", "F": "nodefile", "G": "gpus", "H": "hold",
    "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes", "O": "overcommit", "S": "core-spec", "a": "array",
    "b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error", "i": "input", "k": "no-kill",
    "m": "distribution", "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "s": "oversubscribe", "t": "time",
    "w": "nodelist", "x": "exclude",
}
# fmt: on

# Option → the first Slurm that has it, and the first that has it no more. Seen on 22.05 to 26.05.
VERSIONS: dict[str, tuple[str | None, str | None]] = {
    "container-type": ("26.05", None),
    "mem-update": ("26.05", None),
    "power": (None, "24.05"),
    "resources": ("25.11", None),
}

_ONE_TASK = "one task runs on each node and torchrun starts the ranks; set hardware.processes_per_node"
_STDOUT = "it changes what sbatch prints, and submit reads that; use submit --json"
_OWN_ENVIRONMENT = "the job does not depend on the submitter's environment; use environment.variables or .forward"
_NO_JOB = "it is not about a job"

# What a job file may not set, and what to do instead.
OWNED = {
    "array": "one run folder is one job; submit once per variant",
    "cluster": "sbatch knows it as clusters; export SLURM_CLUSTERS=…, which every command here follows",
    "clusters": "status, tail and cancel would ask another Slurm; export SLURM_CLUSTERS=… for all of them",
    "error": "standard error goes to the log of the run folder, logs/batch.log",
    "export-file": _OWN_ENVIRONMENT,
    "external": "an external job has no batch script, so nothing would run",
    "get-user-env": "the job already starts from the login environment; use environment.setup",
    "help": _NO_JOB,
    "input": "the job reads nothing from standard input",
    "nodes": "set by the job's own key nodes",
    "ntasks": _ONE_TASK,
    "ntasks-per-node": _ONE_TASK,
    "output": "the log is logs/batch.log in the run folder",
    "parsable": _STDOUT,
    "quiet": _STDOUT,
    "tasks-per-node": _ONE_TASK,
    "test-only": "nothing would be queued; use submit --dry-run",
    "usage": _NO_JOB,
    "verbose": _STDOUT,
    "version": _NO_JOB,
    "wait": "submit would block until the job ends; use submit --follow",
    "wrap": "the script is job.sbatch of the run folder",
}

SETTABLE = SWITCHES | SWITCH_OR_VALUE | WITH_VALUE
ALL = SETTABLE | frozenset(OWNED)
