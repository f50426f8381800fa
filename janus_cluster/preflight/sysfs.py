"""The node's root as preflight reads it: /, or the folder that preflight.sysfs_root puts in its place.

<root>/sys/class/infiniband, <root>/sys/module, <root>/sys/class/net, <root>/proc/meminfo and <root>/dev/shm are read
there, and installed packages in <root>/site-packages. A folder that is itself a /sys (it holds class/), or
class/infiniband alone (mlx5_0/ports/…), is accepted too. /proc, /dev/shm and the packages are the real ones where the
folder holds none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NodeRoot:
    """Places of sysfs, procfs, /dev/shm and the installed packages. `packages` is None for what Python itself finds."""

    sys: Path
    infiniband: Path
    proc: Path
    shm: Path
    packages: Path | None = None

    @classmethod
    def of(cls, root: str | None) -> NodeRoot:
        """The real root for None. What a replacement does not hold is absent, except /proc, /dev/shm, packages."""
        if root is None:
            return cls(Path("/sys"), Path("/sys/class/infiniband"), Path("/proc"), Path("/dev/shm"))
        base = Path(root)
        sys = base if not (base / "sys").is_dir() and (base / "class").is_dir() else base / "sys"
        is_copy = not sys.is_dir() and any(base.glob("*/ports"))
        proc, shm, packages = base / "proc", base / "dev" / "shm", base / "site-packages"
        return cls(
            sys,
            base if is_copy else sys / "class" / "infiniband",
            proc if proc.is_dir() else Path("/proc"),
            shm if shm.is_dir() else Path("/dev/shm"),
            packages if packages.is_dir() else None,
        )


def read_text(path: Path) -> str | None:
    """The file's text without blanks around it; None where it cannot be read."""
    try:
        return path.read_bytes()[:65536].decode("utf-8", errors="replace").strip()
    except OSError:
        return None


def read_cgroup_files(root: NodeRoot, controller: str, *, v1: str, v2: str) -> list[str]:
    """What a file of this process's cgroup and of those above it holds; `v1`, `v2`: its name in either version."""
    mounted, found = root.sys / "fs" / "cgroup", []
    for line in (read_text(root.proc / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # An empty list of controllers is cgroup v2.
        base, name = (mounted / controller, v1) if controllers else (mounted, v2)
        folder = Path(path.lstrip("/"))
        found += [read_text(base / above / name) for above in (folder, *folder.parents)]
    return [text for text in found if text]
