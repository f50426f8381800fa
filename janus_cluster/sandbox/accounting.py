"""slurmdbd on a MariaDB of the sandbox's own: data in its folder, one socket in a 0700 folder, no network."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable, Sequence

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox.daemons import is_alive, tail
from janus_cluster.sandbox.layout import Layout
from janus_cluster.sandbox.programs import require_success, run_program
from janus_cluster.sandbox.render import CLUSTER_NAME, DATABASE_NAME
from janus_cluster.sandbox.state import Daemon

DATABASE = "mariadbd"
DBD = "slurmdbd"
_START_LIMIT_S = 30

Start = Callable[[str, Sequence[str], dict[str, str]], Daemon]


def start_database(layout: Layout, start: Start) -> None:
    """MariaDB answers on its socket and has slurmdbd's database.

    start(name, argv, env) starts a daemon and remembers it.
    """
    data = layout.state / "mariadb"
    layout.database_socket.parent.mkdir(mode=0o700, exist_ok=True)
    user = getpass.getuser()
    if not (data / "mysql").exists():
        data.mkdir(mode=0o700)
        install = ["--no-defaults", f"--datadir={data}", f"--user={user}", "--auth-root-authentication-method=normal"]
        require_success(["mariadb-install-db", *install, "--skip-test-db", "--skip-name-resolve"], timeout_s=60)
    # libmariadb 11.8 cannot use a connection any more after "Unknown database", which slurmdbd would create only then.
    layout.database_init.write_text(f"CREATE DATABASE IF NOT EXISTS {DATABASE_NAME};\n", encoding="ascii")
    options = [
        "--no-defaults",
        f"--datadir={data}",
        f"--socket={layout.database_socket}",
        f"--pid-file={layout.run / 'mariadb.pid'}",
        f"--user={user}",
        f"--init-file={layout.database_init}",
        "--skip-networking",
        # Only its owner can enter the socket's folder; a second password would add nothing.
        "--skip-grant-tables",
        "--innodb-buffer-pool-size=64M",
        "--innodb-flush-log-at-trx-commit=0",
    ]
    daemon = start(DATABASE, ["mariadbd", *options], {})
    database = data / DATABASE_NAME
    _wait_until(lambda: layout.database_socket.exists() and database.is_dir(), daemon, layout)


def start_dbd(layout: Layout, start: Start, *, slurm_env: dict[str, str]) -> None:
    """slurmdbd answers and knows this cluster."""
    # libmariadb takes this socket for StorageHost=localhost; slurmdbd.conf has no key for it.
    # slurmdbd takes slurmdbd.conf from the folder of SLURM_CONF.
    env = {**slurm_env, "MYSQL_UNIX_PORT": str(layout.database_socket)}
    daemon = start(DBD, ["slurmdbd", "-D"], env)
    shows = ["sacctmgr", "-n", "-P", "list", "cluster"]
    _wait_until(lambda: run_program(shows, env=slurm_env).returncode == 0, daemon, layout)
    if CLUSTER_NAME not in run_program(shows, env=slurm_env).stdout:
        require_success(["sacctmgr", "-i", "add", "cluster", CLUSTER_NAME], env=slurm_env)


def _wait_until(ready: Callable[[], bool], daemon: Daemon, layout: Layout) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not ready():
        if not is_alive(daemon):
            raise SandboxFailed(f"{daemon.name} ended while it started:\n{tail(layout.log(daemon.name))}")
        if time.monotonic() > deadline:
            raise SandboxFailed(
                f"{daemon.name} did not answer within {_START_LIMIT_S} s:\n{tail(layout.log(daemon.name))}"
            )
        time.sleep(0.05)
