"""The node's root as preflight reads it: /, or the folder that preflight.sysfs_root puts in its place.

<root>/sys/class/infiniband, <root>/sys/module, <root>/sys/class/net, <root>/proc/meminfo and <root>/dev/shm are looked
up there, and installed packages in <root>/site-packages. A folder that is itself a /sys (it holds class/), or
class/infiniband alone (mlx5_0/ports/…), is taken too. /proc, /dev/shm and the packages are the real ones where the
folder holds none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NodeRoot:
    """Where sysfs, procfs, /dev/shm and the installed packages lie. `packages` is None for what Python itself finds."""

    sys: Path
    infiniband: Path
    proc: Path
    shm: Path
    packages: Path | None = None

    @classmethod
    def of(cls, root: str | None) -> NodeRoot:
        """The real one for None. What a stand-in does not hold is absent, except /proc, /dev/shm, packages."""
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
