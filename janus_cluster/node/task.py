"""One phase on one node. srun (or the local launcher) starts it once per node:

    python -m janus_cluster.node.task RUN_DIR --attempt 1 --phase facts|connect|index|all_reduce|train
                                      --master-addr A --master-port P

`facts` reads the node's facts, `connect` tries the master port, `index` reads the data; the other phases exec torchrun,
with the network variables that follow from this node's hardware. All output goes to this node's log.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.job.env import expand_on_node
from janus_cluster.job.resolved import EnvVar, ResolvedJob
from janus_cluster.node.bracket import run_between_counters
from janus_cluster.node.caches import cache_variables
from janus_cluster.node.child import exit_code, start_child
from janus_cluster.node.health import start_sampler
from janus_cluster.node.memory import load_when_visible
from janus_cluster.node.network import network_variables, probe_variables, trace_variables
from janus_cluster.node.oom import describe_oom_kills, read_oom_kills
from janus_cluster.node.read_ahead import start_read_ahead
from janus_cluster.node.temporary import make_private_folder, remove_private_folder
from janus_cluster.node.threads import thread_variables
from janus_cluster.node.topology import NodeIdentity, read_identity
from janus_cluster.node.torchrun import build_torchrun_argv, describe_killed_torchrun
from janus_cluster.preflight.gpu_load import loads_gpus
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.unwritten import os_error_in_batch_log
from janus_cluster.run.parent import end_with_parent
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.gate import ConnectRecord, FactsRecord
from janus_cluster.run.stamped import stamp_output
from janus_cluster.run.text import counted

_INDEX_MODULE = "janus_cluster.training.build_index"
_MODULES = {"all_reduce": "janus_cluster.training.probe", "train": "janus_cluster.training"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the phase; the process ends with its exit code."""
    args = _parse(argv)
    run = RunDir(args.run_dir)
    identity = read_identity(os.environ)
    end_with_the_attempt(os.environ)
    batch_log = os.dup(1)
    with os_error_in_batch_log(batch_log, run.path, node=identity.node, attempt=args.attempt):
        _log_to(run.node_log(args.attempt, identity.node))
        # The attempt recognises by this line that the step was started.
        print(f"{args.phase}: process {os.getpid()} on {identity.node}", flush=True)
    resolved = load_when_visible(run, args.bundle)
    unset = set_node_variables(resolved)
    if args.phase == "facts":
        # Interrupted, this process ends at once: a reader that hangs in the kernel would delay an orderly end.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        facts = _read_facts(resolved, identity, args) | {"unset": unset}
        with os_error_in_batch_log(batch_log, run.path, node=identity.node, attempt=args.attempt):
            FactsRecord(values=facts).write(run.facts_json(args.attempt, identity.node))
        print(f"preflight: {identity.node} has reported its facts in {facts['duration_s']:.1f} s", flush=True)
        return
    if args.phase == "connect":
        _write_connection(run, identity, args)
        return
    if args.phase == "index":
        argv = [sys.executable, "-u", "-m", _INDEX_MODULE, str(run.path), "--bundle", str(args.bundle)]
        os.execve(sys.executable, argv, os.environ)
    command = _torchrun(run, resolved, identity, args)
    print(
        f"{args.phase}: torchrun, node {identity.node_rank + 1} of {identity.num_nodes}, "
        f"{counted(resolved.processes_per_node, 'process')} here, rendezvous {args.master_addr}:{args.master_port}",
        flush=True,
    )
    private = make_private_folder(os.environ) if args.phase == "train" else None
    variables = network_variables(run, resolved, identity, attempt=args.attempt, master_addr=args.master_addr)
    variables += thread_variables(resolved, os.environ)
    if private is not None:
        variables.append(private)
    if args.phase == "train":
        variables += trace_variables(run, resolved, attempt=args.attempt)
        variables += cache_variables(os.environ | ({private.name: private.value} if private else {}))
    if args.phase == "all_reduce":
        variables += probe_variables(run, resolved, identity, attempt=args.attempt)
    for variable in variables:
        print(f"{args.phase}: {variable.name}={variable.value}    # {variable.reason}", flush=True)
    environ = os.environ | {variable.name: variable.value for variable in variables}
    if args.phase == "train":
        start_read_ahead(resolved, node_rank=identity.node_rank)
        start_sampler(run, resolved, attempt=args.attempt, node=identity.node)
        environ |= leave_stop_signals_to_the_ranks()
    if args.phase == "all_reduce":
        counters = run.counters_json(args.attempt, identity.node)
        gate = resolved.job.preflight
        gpu_timeout_s = gate.command_timeout_s if loads_gpus(resolved) else None
        sys.exit(
            run_between_counters(command, environ, counters, sysfs_root=gate.sysfs_root, gpu_timeout_s=gpu_timeout_s)
        )
    sys.exit(_run_training(command, environ, private, NodeRoot.of(resolved.job.preflight.sysfs_root)))


def set_node_variables(resolved: ResolvedJob) -> list[str]:
    """This process's environment has what the job's variables are on this node. Returns: a line for each unset name."""
    values, problems = expand_on_node(resolved.env, os.environ)
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for problem in problems:
        print(f"warning: {problem}; it is left out", flush=True)
    return problems


def end_with_the_attempt(environ: Mapping[str, str]) -> None:
    """Under the local launcher this process, and what it execs, is killed when the attempt ends.

    Slurm ends the steps of a job whose script is gone; here ranks would keep writing beside those of a resumed run.
    """
    if (attempt := environ.get("JANUS_ATTEMPT_PID")) is None:
        return
    if not end_with_parent(int(attempt)):
        sys.exit(128 + signal.SIGKILL)


def _run_training(command: Sequence[str], environ: Mapping[str, str], private: EnvVar | None, root: NodeRoot) -> int:
    """Run torchrun; how it or its ranks were killed is in the node's log, and the ranks' private folder is gone.

    Returns: its exit code.
    """
    before = read_oom_kills(root)
    try:
        code = start_child(command, environ).wait()
    finally:
        if private is not None:
            remove_private_folder(private)
    if (count := read_oom_kills(root) - before) > 0:
        print(describe_oom_kills(count), flush=True)
    if code < 0:
        print(describe_killed_torchrun(signal.Signals(-code).name), flush=True)
    return exit_code(code)


def leave_stop_signals_to_the_ranks() -> dict[str, str]:
    """Ignore stop signals here and in the torchrun that this process execs: Slurm signals all processes of a step.

    torchrun would end its ranks at once, before they could save.
    Returns: variables for torchrun; the equivalent of its option --signals-to-handle, where it has that.
    """
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    return {"PET_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}


def _read_facts(resolved: ResolvedJob, identity: NodeIdentity, args: argparse.Namespace) -> dict[str, Any]:
    from janus_cluster.preflight.facts import read_facts
    from janus_cluster.preflight.interfaces import read_interfaces

    peer = args.master_addr if identity.num_nodes > 1 else None
    facts = read_facts(resolved, node=identity.node, peer=peer)
    return facts | {"interfaces": read_interfaces()}


def _write_connection(run: RunDir, identity: NodeIdentity, args: argparse.Namespace) -> None:
    from janus_cluster.node.connect import exchange

    report = exchange(
        node=identity.node,
        node_rank=identity.node_rank,
        num_nodes=identity.num_nodes,
        address=args.master_addr,
        port=args.master_port,
        token=f"{run.name}/{args.attempt}",
    )
    ConnectRecord(values=report).write(run.connect_json(args.attempt, identity.node))
    print(f"preflight: {args.master_addr}:{args.master_port}: {report['error'] or 'reached'}", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.node.task", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--phase", choices=["facts", "connect", "index", *_MODULES], required=True)
    parser.add_argument("--bundle", type=int, required=True, help="the bundle that the attempt runs")
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=0)
    return parser.parse_args(argv)


def _log_to(path: Path) -> None:
    """Append both output streams of this process and what it execs to `path`; its own lines get time stamps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    stamp_output()


def _torchrun(run: RunDir, resolved: ResolvedJob, identity: NodeIdentity, args: argparse.Namespace) -> list[str]:
    module_args = [str(run.path), "--bundle", str(args.bundle), "--attempt", str(args.attempt), "--node", identity.node]
    return build_torchrun_argv(
        sys.executable,
        _MODULES[args.phase],
        module_args,
        identity=identity,
        processes_per_node=resolved.processes_per_node,
        master_addr=args.master_addr,
        master_port=args.master_port,
        log_dir=run.torchrun_logs(args.attempt, identity.node),
    )


if __name__ == "__main__":
    main()
