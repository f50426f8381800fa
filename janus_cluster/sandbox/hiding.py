"""Making a path vanish for one node only.

Below /mnt/node the node's own file is moved aside. Elsewhere files are everybody's, so the folder is covered by an
empty one, in this node's mount namespace alone: what a node sees when a share was not mounted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.sandbox.hosts import holder_name
from janus_cluster.sandbox.layout import NODE_MOUNT, Layout
from janus_cluster.sandbox.programs import require_success
from janus_cluster.sandbox.state import Fault, SandboxInfo


def hide_path(info: SandboxInfo, layout: Layout, node: str, path: str) -> dict[str, str]:
    """The path is gone on that node.

    Returns: what show_path needs to bring it back.
    Raises:  UsageError if it is not there, or is not one that can be hidden.
    """
    asked = Path(path)
    if not asked.is_absolute() or ".." in asked.parts or asked in (Path("/"), NODE_MOUNT):
        raise UsageError(f"--path {path!r}: an absolute path below {NODE_MOUNT}, or of a folder elsewhere, is wanted")
    own = info.host_path(node, path)
    if own is not None:
        if not own.exists() and not own.is_symlink():
            raise UsageError(f"--path {path}: {node} has no such path", hint=f"on this machine it would be {own}")
        kept = layout.node_hidden(node) / f"{len(list(layout.node_hidden(node).iterdir()))}-{own.name}"
        own.rename(kept)
        return {"path": path, "kept": str(kept)}
    if not asked.is_dir():
        raise UsageError(f"--path {path}: outside of {NODE_MOUNT} only folders can be hidden", hint="hide its folder")
    if layout.home.is_relative_to(asked.resolve()) or layout.short.is_relative_to(asked.resolve()):
        raise UsageError(f"--path {path}: it contains the sandbox itself ({layout.home})")
    _in_mounts(info, node, ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "hidden", str(asked)])
    return {"path": path}


def show_path(info: SandboxInfo, found: Fault) -> None:
    """The hidden path is back. Raises: SandboxFailed if something else has taken its place."""
    path, kept = found.detail["path"], found.detail.get("kept")
    if kept is None:
        _in_mounts(info, found.node, ["umount", path])
        return
    if not Path(kept).exists():
        return
    own = info.host_path(found.node, path)
    if own is None or own.exists():
        raise SandboxFailed(f"{path} of {found.node} was created again while it was hidden; the old one is {kept}")
    own.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(kept, own)


def _in_mounts(info: SandboxInfo, node: str, argv: Sequence[str]) -> None:
    """Run a command in the node's mount namespace."""
    holder = info.daemon(holder_name(node))
    if holder is None:
        raise SandboxFailed(f"host {node} is gone", hint="janus-cluster sandbox down, then up")
    require_success(["nsenter", f"--target={holder.pid}", "--mount", "--", *argv])
