"""All calls of squeue, sinfo, scontrol, sacct and scancel: argv lists, time-outs, parsers. (sbatch: submission.py.)

Squeue, scontrol and sacct name the same things differently; all three are parsed into SlurmJob. Times are asked for
as epoch seconds (SLURM_TIME_FORMAT=%s), so that no time zone is ever guessed.
Source: squeue(1), scontrol(1), sacct(1) of Slurm 22.05, and output captured from it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from janus_cluster.errors import JanusError, JobNotFound, SlurmUnavailable
from janus_cluster.slurm.trouble import Trouble, find_trouble, no_answer

# Job names, reasons and commands may hold any printable character, so columns are separated by one that is not.
_SEPARATOR = "\x1f"
_SQUEUE_FIELDS = (
    *("JobID", "State", "exit_code", "RestartCnt", "NodeList"),
    *("StartTime", "SubmitTime", "Reason", "Command", "Name"),
)
_SACCT_FIELDS = ("JobIDRaw", "State", "ExitCode", "NodeList", "Start", "Submit", "Reason", "JobName")
_NO_VALUE = frozenset({"", "None", "(null)", "N/A", "n/a", "Unknown", "NONE", "None assigned", "(None)"})
# Filters that a user keeps in the environment would hide jobs from us.
_FILTER_PREFIXES = ("SQUEUE_", "SACCT_", "SCONTROL_", "SINFO_")
WAYS_OUT = (
    "--cluster local runs the job on this machine as simulated nodes; "
    "--cluster sandbox runs it on a real Slurm on this machine (janus-cluster sandbox up)"
)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Slurm's answer about one job, from whichever program gave it.

    Units: start_time and submit_time are epoch seconds; None where Slurm names no time.
    """

    job_id: str
    state: str
    source: str
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    restarts: int | None = None
    start_time: float | None = None
    submit_time: float | None = None
    command: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Slurm:
    """One Slurm, reached through its client programs.

    `conf` becomes SLURM_CONF of every program started (the sandbox's, which may have programs of its own), `cluster`
    SLURM_CLUSTERS ("": the configuration's own cluster); None leaves the environment's.
    """

    conf: Path | None = None
    cluster: str | None = None
    # A client gives up on a dead controller after 18 s (measured, 22.05); its own message is better than ours.
    timeout_s: float = 30.0

    def node_address(self, node: str) -> str | None:
        """The address that Slurm uses for the node; None if it names none. Raises: SlurmUnavailable, JanusError."""
        found = re.search(r"\bNodeAddr=(\S+)", self.ask(["scontrol", "show", "node", node]))
        return found.group(1) if found else None

    def usable_nodes(self, partition: str | None) -> dict[str, str]:
        """Node → its GRES (`gpu:h800:8(S:0-1)`) for the nodes of the partition (None: of any) that are neither down
        nor drained. Raises: SlurmUnavailable, JanusError.
        """
        only = [f"--partition={partition}"] if partition else []
        printed = self.ask(["sinfo", "--noheader", "--Node", "--format=%N %T %G", *only])
        rows = (line.split(maxsplit=2) for line in printed.splitlines())
        return {r[0]: r[2] for r in rows if len(r) == 3 and not re.search("down|drain|fail|unknown", r[1])}

    def squeue(self, job_ids: Sequence[str]) -> dict[str, SlurmJob]:
        """Every job of `job_ids` that the controller still holds, finished ones too, from one query.

        Raises: SlurmUnavailable, JanusError.
        """
        if not job_ids:
            return {}
        columns = ",".join(f"{field}:{_SEPARATOR}" for field in _SQUEUE_FIELDS)
        argv = ["squeue", "--noheader", "--all", "--states=all", f"--jobs={','.join(job_ids)}", f"--Format={columns}"]
        return self._squeue(argv)

    def find_job(self, script: Path, *, earlier: Collection[str] = ()) -> SlurmJob | None:
        """The user's newest job that was submitted with `script`, but for those of `earlier`; None if the controller
        holds none. Raises: SlurmUnavailable, JanusError.
        """
        columns = ",".join(f"{field}:{_SEPARATOR}" for field in _SQUEUE_FIELDS)
        jobs = self._squeue(["squeue", "--noheader", "--all", "--states=all", "--me", f"--Format={columns}"])
        ours = [job for i, job in jobs.items() if i not in earlier and (job.command or "").strip() == str(script)]
        return max(ours, key=lambda job: job.submit_time or 0.0, default=None)

    def _squeue(self, argv: Sequence[str]) -> dict[str, SlurmJob]:
        done = self._run(argv)
        # With a single id that it no longer holds squeue fails; with several it leaves that one out.
        names_ids = any(part.startswith("--jobs=") for part in argv)
        if done.returncode != 0 and not (names_ids and "Invalid job id" in done.stderr):
            raise self._failed("squeue", done)
        if _is_cut(done.stdout, len(_SQUEUE_FIELDS)):
            raise JanusError("squeue failed: its answer was cut, so jobs may be missing from it")
        return parse_squeue(done.stdout)

    def scontrol_show_job(self, job_id: str) -> SlurmJob | None:
        """The job as the controller holds it; None once it does not. Raises: SlurmUnavailable, JanusError."""
        done = self._run(["scontrol", "show", "job", job_id])
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise self._failed("scontrol", done)
        job = parse_scontrol_job(done.stdout)
        if done.returncode == 0 and job is None:
            raise JanusError(f"scontrol failed: its answer holds no job {job_id}, and does not deny it")
        return job

    def sacct(self, job_ids: Sequence[str]) -> dict[str, SlurmJob]:
        """The jobs that accounting knows; empty where the site keeps none. Raises: SlurmUnavailable, JanusError."""
        if not job_ids:
            return {}
        if shutil.which("sacct", path=self._environ().get("PATH")) is None:
            return {}
        argv = ["sacct", "--noheader", "--allocations", "--parsable2", f"--delimiter={_SEPARATOR}"]
        done = self._run([*argv, f"--jobs={','.join(job_ids)}", f"--format={','.join(_SACCT_FIELDS)}"])
        if done.returncode != 0 and "accounting storage is disabled" in done.stderr:
            return {}
        if done.returncode != 0:
            raise self._failed("sacct", done)
        return parse_sacct(done.stdout)

    def scancel(self, job_id: str, signal: str | None = None) -> None:
        """Ask the job to end, or send it `signal`. For an unknown job Slurm reports nothing: check first.

        Raises: SlurmUnavailable, JanusError.
        """
        argv = ["scancel", *([f"--signal={signal}"] if signal else []), job_id]
        done = self._run(argv)
        if done.returncode != 0:
            raise self._failed("scancel", done)

    def signal_batch(self, job_id: str, signal: str) -> None:
        """Send `signal` to the batch shell alone, as --signal=B: does before the walltime ends. Raises: as scancel."""
        done = self._run(["scancel", "--batch", f"--signal={signal}", job_id])
        if done.returncode != 0:
            raise self._failed("scancel", done)

    def start_now(self, job_id: str) -> None:
        """Let the waiting job start at once: a requeued one is held for two minutes. Raises: as requeue."""
        self._scontrol(["update", f"JobId={job_id}", "StartTime=now"])

    def requeue(self, job_id: str) -> None:
        """Requeue the job. Raises: JobNotFound, SlurmUnavailable, JanusError."""
        self._scontrol(["requeue", job_id])

    def requeue_without(self, job_id: str, exclude: Sequence[str]) -> None:
        """Requeue the job without the nodes in `exclude`, which replaces its former exclusions.

        Slurm refuses another ExcNodeList for a running job and ends the batch script with the requeue; in between it
        is held, so that it cannot start on the old nodes. It is released in every case: a held job would go unnoticed.
        Slurm starts a requeued job after two minutes at the earliest (measured, 22.05; reason BeginTime).
        Raises: JobNotFound, SlurmUnavailable, JanusError.
        """
        self._scontrol(["requeuehold", job_id])
        try:
            self._scontrol(["update", f"JobId={job_id}", f"ExcNodeList={','.join(exclude)}"])
        finally:
            self._scontrol(["release", job_id])

    def _scontrol(self, arguments: Sequence[str]) -> None:
        """Run scontrol, twice if the requeue's own SIGTERM ended the first one."""
        for _ in range(3):
            done = self._run(["scontrol", *arguments])
            if done.returncode >= 0:
                break
        if done.returncode != 0:
            raise self._failed(f"scontrol {arguments[0]}", done)

    def ask(self, argv: Sequence[str]) -> str:
        """What a client program prints. Raises: SlurmUnavailable, JanusError."""
        done = self._run(argv)
        if done.returncode != 0:
            raise self._failed(argv[0], done)
        return done.stdout

    def environ(self) -> dict[str, str]:
        """This process's environment, with the variables that lead its client programs to this Slurm."""
        env = dict(os.environ)
        if self.conf is not None:
            from janus_cluster.slurm.client_env import client_env

            env |= client_env(self.conf)
        if self.cluster is not None:
            env.pop("SLURM_CLUSTERS", None)
            env |= {"SLURM_CLUSTERS": self.cluster} if self.cluster else {}
        return env

    def _environ(self) -> dict[str, str]:
        env = {k: v for k, v in self.environ().items() if not k.startswith(_FILTER_PREFIXES)}
        return env | {"SLURM_TIME_FORMAT": "%s"}

    def _run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        # The clients wait a minute for a file that does not exist (measured, 22.05).
        if self.conf is not None and not self.conf.is_file():
            raise SlurmUnavailable(f"no {self.conf}: that Slurm was taken down", hint=WAYS_OUT)
        try:
            return subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                env=self._environ(),
                timeout=self.timeout_s,
                check=False,
            )
        except (FileNotFoundError, PermissionError) as e:
            raise SlurmUnavailable(f"no {argv[0]} on PATH: there is no Slurm on this machine", hint=WAYS_OUT) from e
        except subprocess.TimeoutExpired as e:
            raise self._unavailable(argv[0], f"no answer within {self.timeout_s:g} s", no_answer()) from e

    def _failed(self, program: str, done: subprocess.CompletedProcess[str]) -> JanusError:
        message = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}, no output"
        if "Invalid job id" in message:
            return JobNotFound(f"{program}: {message}", hint="janus-cluster list shows the jobs")
        if (trouble := find_trouble(message)) is not None:
            return self._unavailable(program, message, trouble)
        return JanusError(f"{program} failed: {message}")

    def _unavailable(self, program: str, message: str, trouble: Trouble) -> SlurmUnavailable:
        where = f" (SLURM_CONF={self.conf})" if self.conf else ""
        return SlurmUnavailable(f"Slurm{where}: {trouble.cause}. {program}: {message}", hint=trouble.remedy)


def parse_squeue(text: str) -> dict[str, SlurmJob]:
    """Job id → job, from `squeue --Format` with the columns that Slurm.squeue asks for. A line of another shape is
    left out."""
    jobs = {}
    for row in _rows(text, _SQUEUE_FIELDS):
        code, signal = parse_exit_code(row["exit_code"])
        state, _ = _plain_state(row["State"])
        jobs[row["JobID"]] = SlurmJob(
            job_id=row["JobID"],
            state=state,
            source="squeue",
            exit_code=code,
            signal=signal,
            reason=_value(row["Reason"]),
            nodes=parse_hostlist(row["NodeList"]),
            restarts=int(row["RestartCnt"]) if row["RestartCnt"].isdigit() else None,
            start_time=parse_time(row["StartTime"]),
            submit_time=parse_time(row["SubmitTime"]),
            command=_value(row["Command"]),
            name=row["Name"],
        )
    return jobs


def parse_scontrol_job(text: str) -> SlurmJob | None:
    """The job of `scontrol show job <id>`; None when the text holds none."""
    head, _, body = text.partition("\n")
    job_id = re.match(r"JobId=(\d+)(?: |$)", head)
    fields: dict[str, str] = {}
    for line in body.splitlines():
        for key, value in re.findall(r"(?:^|\s)([A-Z][A-Za-z/:]*)=(.*?)(?=\s[A-Z][A-Za-z/:]*=|$)", line.strip()):
            fields.setdefault(key, value)
        if line.lstrip().startswith("Command="):
            fields["Command"] = line.lstrip().removeprefix("Command=")
    if job_id is None or "JobState" not in fields:
        return None
    state, by_whom = _plain_state(fields["JobState"])
    code, signal = parse_exit_code(fields.get("ExitCode", ""))
    return SlurmJob(
        job_id=job_id.group(1),
        state=state,
        source="scontrol",
        exit_code=code,
        signal=signal,
        reason=_value(fields.get("Reason", "")) or by_whom,
        nodes=parse_hostlist(fields.get("NodeList", "")),
        restarts=int(fields["Restarts"]) if fields.get("Restarts", "").isdigit() else None,
        start_time=parse_time(fields.get("StartTime", "")),
        submit_time=parse_time(fields.get("SubmitTime", "")),
        command=_value(fields.get("Command", "")),
        name=name.group(1) if (name := re.search(r" JobName=(.*)$", head)) else "",
    )


def parse_sacct(text: str) -> dict[str, SlurmJob]:
    """Job id → job, from `sacct --parsable2` with the columns that Slurm.sacct asks for; a requeued job's last row
    counts."""
    jobs = {}
    for row in _rows(text, _SACCT_FIELDS):
        state, by_whom = _plain_state(row["State"])
        code, signal = parse_exit_code(row["ExitCode"])
        jobs[row["JobIDRaw"]] = SlurmJob(
            job_id=row["JobIDRaw"],
            state=state,
            source="sacct",
            exit_code=code,
            signal=signal,
            reason=by_whom or _value(row["Reason"]),
            nodes=parse_hostlist(row["NodeList"]),
            start_time=parse_time(row["Start"]),
            submit_time=parse_time(row["Submit"]),
            name=row["JobName"],
        )
    return jobs


def parse_exit_code(text: str) -> tuple[int | None, int | None]:
    """(exit code, signal) of `7:0`, or of the raw wait status that squeue prints (1792 is exit code 7)."""
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        return int(match.group(1)), int(match.group(2)) or None
    if text.strip().isdigit():
        status = int(text)
        return (status >> 8) & 0xFF, (status & 0x7F) or None
    return None, None


def parse_time(text: str) -> float | None:
    """Epoch seconds of `1795233047` or `2026-11-21T03:50:47` (local time); None for N/A and the like."""
    text = text.strip()
    if text.isdigit():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def parse_hostlist(text: str) -> tuple[str, ...]:
    """The hosts of `h800-[01-02,07],login`, in Slurm's order; empty when none is named."""
    if _value(text) is None:
        return ()
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text.strip())
    return tuple(host for part in parts for host in _expand_hosts(part))


def has_gpus(gres: str, gpu_type: str) -> bool:
    """Whether a node with this GRES has GPUs of the type; of a GRES without types, and of "", any."""
    for part in gres.split(","):
        fields = part.split("(")[0].lower().split(":")
        if fields[0] == "gpu" and (len(fields) < 3 or gpu_type.lower() in ("", fields[1])):
            return True
    return False


def _expand_hosts(pattern: str) -> list[str]:
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        return [pattern]
    ranges, _, tail = rest.partition("]")
    numbers: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        if not last:
            numbers.append(first)
        elif first.isdigit() and last.isdigit():
            numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [head + number + end for number in numbers for end in _expand_hosts(tail)]


def _is_cut(text: str, columns: int) -> bool:
    """Whether the answer ends within a row. Lines of a site's wrapper have no separator."""
    rows = [line for line in text.split("\n") if _SEPARATOR in line]
    return bool(text and not text.endswith("\n")) or any(row.count(_SEPARATOR) != columns for row in rows)


def _rows(text: str, fields: Sequence[str]) -> list[Mapping[str, str]]:
    lines = (line.removesuffix(_SEPARATOR).split(_SEPARATOR) for line in text.split("\n"))
    return [dict(zip(fields, values, strict=True)) for values in lines if len(values) == len(fields)]


def _plain_state(text: str) -> tuple[str, str | None]:
    """(state, who did it) of `CANCELLED by 1000`, `COMPLETING,FAILED` or `NODE_FAIL+`."""
    parts = re.split(r"[\s,+]", text.strip().upper(), maxsplit=1)
    by = re.search(r"\bby (\d+)\s*$", text.strip())
    return parts[0], f"cancelled by user id {by.group(1)}" if by else None


def _value(text: str) -> str | None:
    return None if text.strip() in _NO_VALUE else text.strip()
