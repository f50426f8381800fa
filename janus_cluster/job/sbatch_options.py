"""Turn the `slurm:` section of a job file into sbatch's long options. Pure functions.

Typing errors and contradictions are found here; only the site's sbatch knows which options its Slurm has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.job import sbatch_names
from janus_cluster.job.home import BATCH_LOG
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.profiles import is_path
from janus_cluster.job.schema import JobConfig
from janus_cluster.job.walltime import parse_walltime_min

_COMMA_LISTS = frozenset(["constraint", "exclude", "gres", "licenses", "mail-type", "nodelist", "partition"])
# Values of --exclusive that do not mean the whole node.
_SHARES = frozenset(["user", "mcs", "topo"])
_ASKS_FOR_CPUS = ("cpus-per-task", "cpus-per-gpu", "mincpus", "cores-per-socket", "extra-node-info")
_TIMES = frozenset(["time", "time-min"])
# The option on the left takes the place of the default on the right: beside it, sbatch would refuse or mix them.
REPLACES = {
    "gpus": "gres",
    "gpus-per-node": "gres",
    "gpus-per-socket": "gres",
    "gpus-per-task": "gres",
    "mem-per-cpu": "mem",
    "mem-per-gpu": "mem",
    "no-requeue": "requeue",
    "oversubscribe": "exclusive",
    "tres-per-task": "gres",
}

_EXTRA = re.compile(r"--([A-Za-z][A-Za-z0-9_-]*)(?:=(.*))?")
# NONE and NIL leave the submitter's shell behind. NONE has slurmd fetch the login environment, which some sites cannot
# ("user env retrieval failed requeued held"); NIL (Slurm 23.02) has it fetch nothing; ALL takes the shell along.
_EXPORTS = ("NONE", "NIL", "ALL")
_SIGNAL = re.compile(r"(?:B|RB|BR):(?:SIG)?(?:USR1|10)(?:@\d{1,5})?", re.ASCII)


def resolve_sbatch_options(job: JobConfig, *, run_dir: Path) -> dict[str, str | None]:
    """Every option of the #SBATCH lines by its long name; None is a switch. The job's `slurm:` overrides the defaults.

    Raises: UsageError listing every problem of the section, each with its key.
    """
    options = _defaults(job, run_dir)
    problems: list[str] = []
    seen: dict[str, str] = {}
    for key, value in job.slurm.items():
        name = key.replace("_", "-").lstrip("-")
        if name in seen:
            problems.append(f"slurm.{key}: given twice, also as slurm.{seen[name]}")
            continue
        seen[name] = key
        problem = _overlay(options, key, name, value)
        if problem:
            problems.append(problem)
    for line in job.slurm_extra:
        if problem := _add_extra(options, line):
            problems.append(problem)
    problems += [
        f"srun_extra: {line!r}: an option begins with a dash and is one line"
        for line in job.srun_extra
        if not line.startswith("-") or not line.isprintable()
    ]
    if "exclusive" not in options and "mem" not in seen:
        # Of a shared node the job gets what the partition gives it.
        options.pop("mem", None)
    if "gpus" in seen and "-" in (options["nodes"] or ""):
        problems.append("slurm.gpus: counts the GPUs of all nodes, which nodes_min leaves open; allowed: gpus-per-node")
    problems += _gpu_contradictions(job.hardware.gpus_per_node, job.nodes, options)
    if problems:
        raise UsageError.of_many(problems, hint="`man sbatch` lists the options; write the long name without dashes")
    return options


def warn_of_few_cpus(options: Mapping[str, str | None], *, ranks: int, workers: int) -> list[str]:
    """A job that shares its nodes and asks for no CPUs gets one for its one task (sbatch(1)): all ranks share it."""
    has_whole_nodes = "exclusive" in options and options["exclusive"] not in _SHARES
    asks = any(name in options for name in _ASKS_FOR_CPUS) or "cpu" in (options.get("tres-per-task") or "")
    if has_whole_nodes or asks:
        return []
    needed = ranks * (1 + workers)
    shown = "false" if "exclusive" not in options else str(options["exclusive"])
    return [
        f"slurm.exclusive: {shown}: a node may give the job one CPU for {ranks} ranks of {workers} data workers each; "
        f"type --set slurm.cpus-per-task={needed}, or leave slurm.exclusive out"
    ]


def _defaults(job: JobConfig, run_dir: Path) -> dict[str, str | None]:
    hardware = job.hardware
    options: dict[str, str | None] = {"job-name": job.name, "nodes": _nodes(job), "ntasks-per-node": "1"}
    if "-" in _nodes(job):
        # With it Slurm gives the least number of nodes and not the most (seen with 22.05); steps have it of their own.
        del options["ntasks-per-node"]
    if hardware.gpus_per_node:
        options["gres"] = ":".join(filter(None, ["gpu", gres_type(hardware.gpu_type), str(hardware.gpus_per_node)]))
    options |= {
        "exclusive": None,
        # All of it: an exclusive job gets all CPUs and GPUs, but no more memory than it asked for (sbatch(1)).
        "mem": "0",
        "time": "24:00:00",
        "output": _output_pattern(run_dir / BATCH_LOG, run_dir),
        "open-mode": "append",
        "requeue": None,
        "signal": "B:USR1@300",
        "export": "NONE",
    }
    return options


def gres_type(gpu_type: str) -> str:
    """The type in --gres: hardware.gpu_type, or the name of its file."""
    return Path(gpu_type).stem if is_path(gpu_type) else gpu_type


def _nodes(job: JobConfig) -> str:
    """sbatch's --nodes: a number, or the least and the most."""
    has_range = job.kind == "train" and job.nodes_min not in (None, job.nodes)
    return f"{job.nodes_min}-{job.nodes}" if has_range else str(job.nodes)


def _output_pattern(log: Path, run_dir: Path) -> str:
    """sbatch's file name pattern for exactly `log`: there % begins a replacement and a backslash ends them all."""
    if "\\" in str(log):
        raise UsageError(
            f"run folder {str(run_dir)!r}: Slurm cannot write a log to a path with a backslash",
            hint="choose another runs_dir or name",
        )
    try:
        _check_one_line(str(log))
    except ValueError as e:
        raise UsageError(f"run folder {str(run_dir)!r}: {e}", hint="choose another runs_dir or name") from e
    return str(log).replace("%", "%%")


def _overlay(options: dict[str, str | None], key: str, name: str, value: object) -> str | None:
    """Put one option of the user's in. Returns: the problem with it, if there is one."""
    if name in sbatch_names.OWNED:
        return f"slurm.{key}: may not be set here: {sbatch_names.OWNED[name]}"
    if name not in sbatch_names.SETTABLE:
        return f"slurm.{key}: sbatch has no option of this name{_guess(name)}; a plugin's goes under slurm_extra"
    if value is None or value == "":
        return None
    if value is False:
        options.pop(name, None)
        return None
    try:
        text = _option_text(name, value)
    except ValueError as e:
        return f"slurm.{key}: {value!r}: {e}"
    if name != "tres-per-task" or _gpus_asked(name, text or "") is not None:
        options.pop(REPLACES.get(name, ""), None)
    options[name] = text
    return None


def _join_list(name: str, items: Sequence[str]) -> str:
    """A YAML list as sbatch's text. `constraint: [rack1|rack2]` is one: there Slurm's own brackets are meant."""
    if name == "constraint" and len(items) == 1 and set(items[0]) & set("|&*"):
        return f"[{items[0]}]"
    return ",".join(items)


def _add_extra(options: dict[str, str | None], line: str) -> str | None:
    """Put an option in that sbatch has from a plugin, unchecked. Returns: the problem with it, if there is one."""
    found = _EXTRA.fullmatch(line)
    if found is None or not line.isprintable():
        return f"slurm_extra: {line!r}: allowed: --name or --name=value, on one line"
    name, value = found.groups()
    if name in sbatch_names.ALL:
        return f"slurm_extra: {line!r}: an option of sbatch itself; use slurm.{name}"
    if name in options:
        return f"slurm_extra: {line!r}: --{name} is given twice"
    options[name] = value
    return None


def _option_text(name: str, value: object) -> str | None:
    if value is True and name not in sbatch_names.WITH_VALUE:
        return None
    if name in sbatch_names.SWITCHES:
        raise ValueError(f"--{name} is a switch; allowed: true, false")
    if isinstance(value, list) and name in _COMMA_LISTS:
        value = _join_list(name, value)
    if not isinstance(value, str):
        raise ValueError(f"--{name} needs a value: text or a whole number")
    text = value
    _check_one_line(text)
    if name in _TIMES:
        parse_walltime_min(text)
    if name == "signal" and not _SIGNAL.fullmatch(text):
        raise ValueError("the attempt listens for USR1 in the batch shell; allowed: B:USR1@<seconds before the end>")
    if name == "export" and text not in _EXPORTS:
        raise ValueError(f"allowed: {', '.join(_EXPORTS)}; single variables go under environment.variables or .forward")
    if name == "open-mode" and text != "append":
        raise ValueError("a requeued job would erase the log of the attempt before; allowed: append")
    return text


def _check_one_line(text: str) -> None:
    """Nothing, if one #SBATCH line can carry the text. Raises: ValueError."""
    bad = next((c for c in text if not c.isprintable()), None)
    if bad is not None:
        raise ValueError(f"the character {bad!r} is not possible in an #SBATCH line")


def _gpu_contradictions(gpus_per_node: int, nodes: int, options: Mapping[str, str | None]) -> list[str]:
    """Mistakes in GPU requests that differ from hardware.gpus_per_node; --gpus counts those of all nodes."""
    problems = []
    for name in ("gres", "gpus", "gpus-per-node", "gpus-per-task", "tres-per-task"):
        asked = _gpus_asked(name, options.get(name) or "")
        over = nodes if name == "gpus" else 1
        if asked is not None and asked != gpus_per_node * over:
            on_all = f" on each of {nodes} nodes" if over > 1 else ""
            problems.append(
                f"slurm.{name}: {options[name]!r} asks for {asked} GPUs, but hardware.gpus_per_node is "
                f"{gpus_per_node}{on_all}"
            )
    return problems


def _gpus_asked(name: str, text: str) -> int | None:
    """GPUs in `gpu:h800:8,shard:1` (gres), `cpu=16,gres/gpu:h800=8` (tres) or `h800:8` (gpus-per-…).

    None where there is no plain number of them.
    """
    is_list = name in ("gres", "tres-per-task")
    counts = []
    for part in text.split(","):
        resource = part.split("(")[0]
        if name == "tres-per-task" and not resource.startswith("gres/"):
            continue
        fields = re.split(r"[:=]", resource.removeprefix("gres/"))
        if is_list and fields[0] != "gpu":
            continue
        last = fields[-1]
        if last.isdecimal():
            counts.append(int(last))
        elif is_list:
            counts.append(1)
    return sum(counts) if counts else None


def _guess(name: str) -> str:
    if name in sbatch_names.SHORT:
        return f"; -{name} is {sbatch_names.SHORT[name]!r}"
    return did_you_mean(name.lower(), sbatch_names.ALL)
