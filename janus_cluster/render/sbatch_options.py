"""The `slurm:` section of a job file becomes sbatch's long options. Pure functions.

Whether the site's own Slurm knows an option is for its sbatch to say; here typing errors and contradictions are found.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from janus_cluster.config.schema import JobConfig
from janus_cluster.errors import UsageError
from janus_cluster.render import sbatch_names
from janus_cluster.rundir import RunDir

_COMMA_LISTS = frozenset(["constraint", "exclude", "gres", "licenses", "mail-type", "nodelist", "partition"])
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

_WALLTIME = re.compile(
    r"(?P<minutes>\d+)"
    r"|(?P<m>\d+):(?P<s>[0-5]?\d)"
    r"|(?P<h>\d+):(?P<hm>[0-5]?\d):(?P<hs>[0-5]?\d)"
    r"|(?P<d>\d+)-(?P<dh>[01]?\d|2[0-3])(?::(?P<dm>[0-5]?\d)(?::(?P<ds>[0-5]?\d))?)?",
    re.ASCII,
)
_UNIT_S = {"d": 86400, "dh": 3600, "h": 3600, "minutes": 60, "m": 60, "hm": 60, "dm": 60, "s": 1, "hs": 1, "ds": 1}
_UNLIMITED = frozenset(["UNLIMITED", "INFINITE"])
# NONE and NIL leave the submitter's shell behind. NONE has slurmd fetch the login environment, which some sites cannot
# ("user env retrieval failed requeued held"); NIL (Slurm 23.02) has it fetch nothing; ALL takes the shell along.
_EXPORTS = ("NONE", "NIL", "ALL")
_SIGNAL = re.compile(r"(?:B|RB|BR):(?:SIG)?(?:USR1|10)(?:@\d{1,5})?", re.ASCII)


def resolve_sbatch_options(job: JobConfig, *, run_dir: Path) -> dict[str, str | None]:
    """Every option of the #SBATCH lines by its long name; None is a switch. The job's own `slurm:` wins over defaults.

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
    if "exclusive" not in options and "mem" not in seen:
        # Of a shared node the job gets what the partition gives it.
        options.pop("mem", None)
    problems += _gpu_contradictions(job.hardware.gpus_per_node, job.nodes, options)
    if problems:
        raise UsageError.of_many(problems, hint="`man sbatch` lists the options; write the long name without dashes")
    return options


def parse_walltime_min(text: str) -> int | None:
    """Minutes of a Slurm time limit, rounded up as Slurm does; None: without limit. Raises: ValueError."""
    if text.upper() in _UNLIMITED:
        return None
    match = _WALLTIME.fullmatch(text)
    if match is None:
        raise ValueError(
            "no time limit; allowed: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, e.g. 24:00:00, 2-12"
        )
    total_s = sum(_UNIT_S[unit] * int(count) for unit, count in match.groupdict().items() if count)
    if total_s == 0:
        raise ValueError("0 means no limit to Slurm; write UNLIMITED if that is meant")
    return -(-total_s // 60)


def _defaults(job: JobConfig, run_dir: Path) -> dict[str, str | None]:
    hardware = job.hardware
    options: dict[str, str | None] = {"job-name": job.name, "nodes": str(job.nodes), "ntasks-per-node": "1"}
    if hardware.gpus_per_node:
        options["gres"] = ":".join(filter(None, ["gpu", hardware.gpu_type, str(hardware.gpus_per_node)]))
    options |= {
        "exclusive": None,
        # All of it: an exclusive job gets all CPUs and GPUs, but no more memory than it asked for (sbatch(1)).
        "mem": "0",
        "time": "24:00:00",
        "output": _output_pattern(RunDir(run_dir).batch_log, run_dir),
        "open-mode": "append",
        "requeue": None,
        "signal": "B:USR1@300",
        "export": "NONE",
    }
    return options


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
        return f"slurm.{key}: sbatch has no option of this name{_did_you_mean(name)}"
    if value is None or value == "":
        return None
    if value is False:
        options.pop(name, None)
        return None
    try:
        text = _option_text(name, value)
    except ValueError as e:
        return f"slurm.{key}: {value!r}: {e}"
    options.pop(REPLACES.get(name, ""), None)
    options[name] = text
    return None


def _option_text(name: str, value: object) -> str | None:
    if value is True and name not in sbatch_names.WITH_VALUE:
        return None
    if name in sbatch_names.SWITCHES:
        raise ValueError(f"--{name} is a switch; allowed: true, false")
    if isinstance(value, (list, tuple)) and name in _COMMA_LISTS:
        value = ",".join(str(part) for part in value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"--{name} needs a value: text or a whole number")
    text = str(value)
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
        raise ValueError(f"the character {bad!r} cannot stand in an #SBATCH line")


def _gpu_contradictions(gpus_per_node: int, nodes: int, options: Mapping[str, str | None]) -> list[str]:
    """What is wrong with GPU requests that do not ask for hardware.gpus_per_node; --gpus counts those of all nodes."""
    problems = []
    for name in ("gres", "gpus", "gpus-per-node", "gpus-per-task"):
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
    """GPUs in `gpu:h800:8,shard:1` (gres) or `h800:8` (gpus-per-…); None where there is no plain number of them."""
    counts = []
    for part in text.split(","):
        fields = part.split("(")[0].removeprefix("gres/").split(":")
        if name == "gres" and fields[0] != "gpu":
            continue
        last = fields[-1]
        if last.isdecimal():
            counts.append(int(last))
        elif name == "gres":
            counts.append(1)
    return sum(counts) if counts else None


def _did_you_mean(name: str) -> str:
    if name in sbatch_names.SHORT:
        return f"; -{name} is {sbatch_names.SHORT[name]!r}"
    near = difflib.get_close_matches(name.lower(), sorted(sbatch_names.ALL), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
