"""Which Slurm the sandbox runs: where its programs are, its version, and the settings that the version needs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox.programs import SYSTEM_PATH, require_programs, require_success, search_path, slurm_programs

VARIABLE = "SLURM_ROOT"
MESSAGE_TIMEOUT_S = 10

Release = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """Values of the configuration that differ between versions of Slurm."""

    cgroup_plugin: str
    unkillable_step_timeout_s: int


# The first release that needs it → settings. Source: tried on 22.05, 24.11 and 26.05.
_SETTINGS: Mapping[Release, Settings] = {
    # cgroup/v1 starts without a mounted cgroup tree; `disabled` does not exist yet.
    (22, 5): Settings(cgroup_plugin="cgroup/v1", unkillable_step_timeout_s=30),
    # UnkillableStepTimeout must be at least 5 times MessageTimeout.
    (24, 5): Settings(cgroup_plugin="disabled", unkillable_step_timeout_s=5 * MESSAGE_TIMEOUT_S),
}
OLDEST = min(_SETTINGS)


@dataclass(frozen=True)
class SlurmBuild:
    """One installed Slurm. root: the prefix whose bin/ and sbin/ are searched before PATH; None: PATH is enough."""

    version: str
    root: str | None = None

    @property
    def title(self) -> str:
        """`Slurm 24.11.5 in /opt/slurm`."""
        return f"Slurm {self.version}" + (f" in {self.root}" if self.root else "")


def find_slurm(environ: Mapping[str, str] | None = None, *, accounting: bool = False) -> SlurmBuild:
    """The Slurm that a new sandbox runs: that of $SLURM_ROOT, else the one on PATH.

    Raises: SandboxFailed if a program is missing, or if the version is too old or unknown.
    """
    root = find_root(environ, accounting=accounting)
    path = search_path(environ, root=root)
    require_programs(accounting=accounting, path=path)
    printed = require_success(["slurmctld", "-V"], env={"PATH": path})
    build = SlurmBuild(parse_version(printed), root)
    if parse_release(build.version) < OLDEST:
        raise SandboxFailed(
            f"{build.title}: the sandbox needs Slurm {OLDEST[0]}.{OLDEST[1]:02} or newer", hint=f"set {VARIABLE}"
        )
    return build


def find_root(environ: Mapping[str, str] | None = None, *, accounting: bool = False) -> str | None:
    """$SLURM_ROOT, or the prefix of a slurmctld that PATH has outside of the system's folders; None for the system's.

    Daemons and jobs do not inherit the caller's PATH: a Slurm that only PATH names would be mixed with the system's.
    Raises: SandboxFailed if SLURM_ROOT lacks programs.
    """
    env = os.environ if environ is None else environ
    given = env.get(VARIABLE)
    if given:
        return _require_root(Path(given), accounting)
    found = shutil.which("slurmctld", path=search_path(env))
    if found is None or str(Path(found).parent) in SYSTEM_PATH:
        return None
    root = Path(found).absolute().parent.parent
    return None if _missing_from(root, accounting) else str(root)


def settings_of(version: str) -> Settings:
    """What that version needs: the newest row that is not newer than it. Raises: SandboxFailed for an odd version."""
    release = parse_release(version)
    return _SETTINGS[max(r for r in _SETTINGS if r <= max(release, OLDEST))]


def parse_version(text: str) -> str:
    """`24.11.5` of what `slurmctld -V` prints (`slurm 24.11.5`, `slurm-wlm 22.05.8`). Raises: SandboxFailed."""
    found = re.search(r"\b\d+\.\d+(?:\.\d+)*(?:-?rc\d+)?", text)
    if found is None:
        raise SandboxFailed(f"slurmctld -V prints no version: {text.strip()!r}")
    return found[0]


def parse_release(version: str) -> Release:
    """(24, 11) of `24.11.5`."""
    year, month = parse_version(version).split(".")[:2]
    return int(year), int(month.split("-")[0].split("rc")[0])


def _require_root(given: Path, accounting: bool) -> str:
    root = Path(os.path.expanduser(given)).absolute()
    missing = _missing_from(root, accounting)
    # The folder is written into slurm.conf, PATH and a shell script.
    if not missing and re.fullmatch(r"[\w./+@~-]+", str(root), flags=re.ASCII):
        return str(root)
    what = (
        f"no {', '.join(missing)} in its bin/ or sbin/" if missing else "only letters, digits and ._/+@~- may be in it"
    )
    raise SandboxFailed(
        f"{VARIABLE}={given}: {what}",
        hint=f"{VARIABLE} is the prefix of a Slurm build (bin/srun, sbin/slurmctld, …); without it PATH is searched",
    )


def _missing_from(root: Path, accounting: bool) -> list[str]:
    path = os.pathsep.join([str(root / "bin"), str(root / "sbin")])
    return [p for p in slurm_programs(accounting=accounting) if shutil.which(p, path=path) is None]
