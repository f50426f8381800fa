"""A real Slurm of one to eight nodes on this one machine, in a folder of its own, for rehearsal, demo and tests.

layout.py      paths and names inside the sandbox's folder      state.py     what is written down of a running one
programs.py    which programs are needed, running them          daemons.py   start, recognise and end processes
network.py     the hosts' namespaces, rails and addresses       render.py    slurm.conf and its companions
accounting.py  slurmdbd on a private MariaDB                    lifecycle.py up, down, status
faults.py      cut and slow links, hide paths, stop slurmd      versions.py  which Slurm, and what its version needs
"""

from janus_cluster.sandbox.faults import fault, heal
from janus_cluster.sandbox.lifecycle import down, status, up
from janus_cluster.sandbox.state import SandboxInfo, SandboxStatus, load_info

__all__ = ["SandboxInfo", "SandboxStatus", "down", "fault", "heal", "load_info", "status", "up"]
