"""What the fault matrix works with: a sound node and broken ones, models, a site's own thresholds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from node_fixtures import FakeNode
from test_paths_content import cut, write_data, write_model, write_vggt

from janus_cluster.job.resources import jobs_dir, templates_dir

MEMLOCK_FAIL_BELOW_GIB = 0.001
# What a machine without GPUs can measure, in place of the floors of real ones.
ACTIVE = ("gemm", "intra_node", "rails", "transport", "all_reduce")


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Sound things, broken things, and the names by which lines know them."""

    folder: Path
    names: dict[str, str]
    env: dict[str, str]

    def command(self, *argv: str, sets: Sequence[str] = (), setup: str = ":") -> list[str]:
        """`janus-cluster preflight demo` of this workshop, as JSON, judged as an H800 node; `setup` is run before."""
        n = self.names
        exports = f"PATH={n['NODE']}/bin:$PATH PYTHONPATH={n['SITE']} SLURM_TASK_PROLOG={n['PROLOG']}"
        sets = [
            f"environment.setup=['export {exports}', '{setup}']",
            "preflight.profile=h800-ib",
            f"preflight.sysfs_root={n['NODE']}/root",
            f"runs_dir={n['RUNS']}",
            f"model.path={n['MODEL']}",
            f"model.vggt_path={n['FOLDER']}/vggt.safetensors",
            f"data.roots={n['FOLDER']}/data",
            "preflight.min_free_gb=0.1",
            "preflight.command_timeout_s=2",
            "preflight.use_node_memory=false",
            *sets,
        ]
        options = [word for value in sets for word in ("--set", value)]
        return [sys.executable, "-m", "janus_cluster.cli", "preflight", "demo", "--json", *options, *argv]

    def bad_node(self, tree: dict[str, Any]) -> dict[str, str]:
        """The names, with BAD_NODE the folder of a node that has those changes."""
        folder = self.folder / "bad_node"
        shutil.rmtree(folder, ignore_errors=True)
        FakeNode(folder, **tree).write()
        return self.names | {"BAD_NODE": str(folder)}


def write_site(folder: Path) -> None:
    """This checkout as a site would keep it: with floors of its own in the profile h800-ib."""
    for source in (templates_dir(), jobs_dir(), Path(sys.modules["janus_cluster"].__path__[0])):
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").touch()
    profiles = folder / "templates" / "preflight"
    profile, cpu = (yaml.safe_load((profiles / f"{name}.yaml").read_text()) for name in ("h800-ib", "cpu"))
    profile |= {name: cpu[name] for name in ACTIVE}
    # Profiles that build on this one name the layer.
    profile["transport"] |= {"layer": "IB"}
    # How much this machine lets a process have is not what is tested here: many grant no 32 GiB of locked memory.
    profile["limits"]["nofile"] = cpu["limits"]["nofile"]
    profile["limits"]["memlock_gib"] |= {"warn_below": MEMLOCK_FAIL_BELOW_GIB, "fail_below": MEMLOCK_FAIL_BELOW_GIB}
    (profiles / "h800-ib.yaml").write_text(yaml.safe_dump(profile))


# libfaketime cannot do it: it shifts the monotonic clock too, and without that breaks time.sleep of Python 3.11.
SKEW = """
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += 120;
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += 120;
    return failed;
}
"""


def write_prolog(path: Path, *lines: str) -> str:
    """A task prolog: Slurm runs it on each node before the task, and takes variables from what it prints."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def build_workshop(folder: Path) -> Workshop:
    """Create everything in the folder that the lines of the table name."""
    write_site(folder / "site")
    FakeNode(folder / "node").write()
    names = {"FOLDER": str(folder), "SITE": str(folder / "site"), "NODE": str(folder / "node")}
    for name, break_it in (
        ("MODEL", lambda m: None),
        ("WITHOUT_SHARD", lambda m: (m / "model-00002-of-00002.safetensors").unlink()),
        ("CUT_MODEL", lambda m: cut(m / "model-00001-of-00002.safetensors", 100)),
    ):
        names[name] = str(write_model(folder / name.lower()))
        break_it(Path(names[name]))
    write_vggt(folder / "vggt.safetensors")
    write_data(folder / "data")
    (folder / "runs").mkdir()
    (folder / "home").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "skew.c").write_text(SKEW)
    if shutil.which("cc"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "skew.so"), str(folder / "skew.c")], check=True)
    names |= {
        "RUNS": str(folder / "runs"),
        "FIFO": str(folder / "fifo"),
        "PROLOG": write_prolog(folder / "prolog"),
        "SKEWED_PROLOG": write_prolog(folder / "skewed_prolog", f"echo export LD_PRELOAD={folder}/skew.so"),
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "TORCH_", "OMP_", "CUDA_", "MODEL_"))}
    env = {"JANUS_HOME": str(folder / "home"), "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    return Workshop(folder=folder, names=names, env=clean | env)
