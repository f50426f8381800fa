"""Which programs the sandbox needs, where they are, and running them with a limit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from janus_cluster.errors import SandboxFailed

# Program → Debian/Ubuntu package that has it.
_SLURM = dict.fromkeys(("slurmctld", "slurmd", "scontrol", "sinfo", "squeue", "scancel", "sbatch", "srun"), "slurm-wlm")
_MUNGE = {"munged": "munge"}
_NAMESPACES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
_SLURM_ACCOUNTING = {"slurmdbd": "slurmdbd", "sacctmgr": "slurm-wlm"}
_DATABASE = {
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
_MORE_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# Where an init system looks for programs.
SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin", *_MORE_FOLDERS)


def search_path(environ: Mapping[str, str] | None = None, *, root: str | None = None) -> str:
    """PATH with the system folders that an ordinary user's PATH leaves out, where the daemons are.

    root: the prefix of a Slurm build (versions.py), whose programs are found before all others.
    """
    env = os.environ if environ is None else environ
    first = [f"{root}/bin", f"{root}/sbin"] if root else []
    return os.pathsep.join([*first, env.get("PATH", os.defpath), *_MORE_FOLDERS])


def slurm_programs(*, accounting: bool = False) -> dict[str, str]:
    """Program → package for each program of Slurm itself that a sandbox needs."""
    return _SLURM | (_SLURM_ACCOUNTING if accounting else {})


def find_missing(*, accounting: bool = False, path: str | None = None) -> dict[str, str]:
    """Program → package for each program that a plain sandbox needs and this machine lacks."""
    needed = slurm_programs(accounting=accounting) | _MUNGE | (_DATABASE if accounting else {})
    return {p: package for p, package in needed.items() if not shutil.which(p, path=path or search_path())}


def require_programs(*, accounting: bool = False, path: str | None = None) -> None:
    """Return only if every program is there. Raises: SandboxFailed that names each missing one and its package."""
    missing = find_missing(accounting=accounting, path=path)
    if missing:
        names = ", ".join(f"{program} (Debian package {package})" for program, package in missing.items())
        packages = " ".join(sorted(set(missing.values())))
        raise SandboxFailed(
            f"the sandbox needs programs that are not installed: {names}", hint=f"apt-get install {packages}"
        )


def find_program(name: str, *, path: str | None = None) -> str:
    """The program's full path. Raises: SandboxFailed if it is not installed."""
    found = shutil.which(name, path=path or search_path())
    if found is None:
        package = (slurm_programs(accounting=True) | _MUNGE | _NAMESPACES | _DATABASE).get(name, name)
        raise SandboxFailed(f"{name} is not installed (Debian package {package})", hint=f"apt-get install {package}")
    return found


def namespaces_problem() -> str | None:
    """Why hosts of their own cannot be made here, or None if they can: it is tried, not guessed."""
    if os.geteuid() != 0:
        return "only root may make network namespaces, and this is not root"
    for program, package in _NAMESPACES.items():
        if not shutil.which(program, path=search_path()):
            return f"{program} is not installed (Debian package {package})"
    tried = run_program(["unshare", "--net", "--uts", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
    if tried.returncode != 0:
        return f"this machine does not let root make namespaces: {tried.stderr.strip()}"
    return None


def run_program(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, stdin: str | None = None, timeout_s: float = 20
) -> subprocess.CompletedProcess[str]:
    """The finished process, whatever its exit code; `env` is added to ours, and its PATH is searched for the program.

    Raises:  SandboxFailed if the program is missing or takes longer than timeout_s.
    """
    environ = {**os.environ, "PATH": search_path(), **(env or {})}
    try:
        return subprocess.run(
            [find_program(argv[0], path=environ["PATH"]), *argv[1:]],
            env=environ,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise SandboxFailed(f"{' '.join(argv)} did not end within {timeout_s:g} s") from e


def require_success(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, stdin: str | None = None, timeout_s: float = 20
) -> str:
    """The program's stdout. Raises: SandboxFailed with its stderr."""
    done = run_program(argv, env=env, stdin=stdin, timeout_s=timeout_s)
    if done.returncode != 0:
        printed = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise SandboxFailed(f"{' '.join(argv)} ended with {done.returncode}: {printed}")
    return done.stdout
