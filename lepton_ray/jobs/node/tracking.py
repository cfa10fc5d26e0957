"""The MLflow server of a cluster's head: behind a password, its databases kept in the storage.

``python -m lepton_ray.jobs.node.tracking --host IP --port 5000 ...``; the admin's name and password
come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

from __future__ import annotations

import argparse
import configparser
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from lepton_ray import storage
from lepton_ray.errors import LeptonRayError
from lepton_ray.jobs.node.backup import Backup

logger = logging.getLogger(__name__)

EVERY_S = 60.0  # between two backups: what is lost at most when the head loses power
LOOK_S = 2.0
LEAVE_S = 60.0  # after Ray's end, on machines that stay
STOP_S = 20.0


def main(arguments: list[str] | None = None) -> int:
    """Restore, serve and back up until SIGTERM or the server's end."""
    parser = argparse.ArgumentParser(description="the MLflow server of a cluster's head")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the databases")
    parser.add_argument(
        "--key", type=Path, required=True, help="file of the key that signs sessions"
    )
    parser.add_argument("--ray-port", type=int, help="of the GCS: at its end, back up at once")
    parser.add_argument(
        "--allow-host", action="append", default=[], help="a name by which it is reached"
    )
    parser.add_argument("--every-s", type=float, default=EVERY_S)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    root = os.environ.get("LEPTON_STORAGE", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not root or not password:
        parser.error("needs LEPTON_STORAGE and MLFLOW_TRACKING_PASSWORD in the environment")
    names = [f"{options.host}:{options.port}", "127.0.0.1:*", "localhost:*", *options.allow_host]
    server = Server(options.folder, options.host, options.port, names, root, options.key)
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    try:
        server.start()
    except (LeptonRayError, OSError) as error:
        logger.error("%s", error)
        return 1
    try:
        return watch(server, stop, options.ray_port, options.every_s)
    finally:
        server.stop()
        server.back_up()


class Server:
    """MLflow as a child process, and the backups of its databases.

    Args:
        folder: of the databases on this machine.
        names: by which clients reach it, with ports; a request by another is refused.
        root: LEPTON_STORAGE.
        key: file of the key that signs sessions.
    """

    def __init__(
        self, folder: Path, host: str, port: int, names: list[str], root: str, key: Path
    ) -> None:
        self._folder, self._host, self._port, self._key = folder, host, port, key
        self._names = names
        self._root = root.rstrip("/")
        self._database = os.environ.get("LEPTON_MLFLOW_DB") or f"sqlite:///{folder}/mlflow.db"
        names = ["users.db"]
        if self._database.startswith("sqlite:"):
            names.append("mlflow.db")
        self._backups = [Backup(folder / name, f"{self._root}/mlflow/backup") for name in names]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Restore the databases and start MLflow on them.

        Raises:
            StoreError: when the copies in the storage are damaged.
            OSError: when the storage cannot be read.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for backup in self._backups:
            if backup.restore():
                logger.info("restored %s from %s", backup.name, self._root)
        users = f"sqlite:///{self._folder}/users.db"
        config = configparser.ConfigParser()
        config["mlflow"] = {
            "default_permission": "NO_PERMISSIONS",
            "database_uri": users,
            "admin_username": os.environ.get("MLFLOW_TRACKING_USERNAME", "admin"),
            "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
            "grant_default_workspace_access": "false",
            # Else each request hashes the password anew, which takes longer than its answer.
            "auth_cache_ttl_seconds": "60",
        }
        path = self._folder / "auth.ini"
        with path.open("w") as file:
            config.write(file)
        self._set_password(users)
        environment = {
            **os.environ,
            "MLFLOW_AUTH_CONFIG_PATH": str(path),
            "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._key.read_text().strip(),
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        del environment["MLFLOW_TRACKING_PASSWORD"]
        environment.pop("MLFLOW_TRACKING_URI", None)
        artifacts = os.environ.get("LEPTON_ARTIFACTS") or f"{self._root}/mlflow/artifacts"
        if not storage.is_uri(artifacts):
            Path(artifacts).mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth",
                "--host", self._host, "--port", str(self._port), "--workers", "1",
                "--allowed-hosts", ",".join(self._names),
                "--backend-store-uri", self._database,
                "--serve-artifacts", "--artifacts-destination", artifacts,
            ],
            env=environment, cwd=self._folder, start_new_session=True,
        )  # fmt: skip

    def _set_password(self, users: str) -> None:
        """The admin's password is this machine's, also in a database of an earlier machine."""
        if not (self._folder / "users.db").exists():
            return
        from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

        store = SqlAlchemyStore()
        store.init_db(users)
        name = os.environ.get("MLFLOW_TRACKING_USERNAME", "admin")
        store.update_user(name, password=os.environ["MLFLOW_TRACKING_PASSWORD"])
        store.engine.dispose()

    def ended(self) -> int | None:
        """The server's exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def back_up(self) -> None:
        """Save what changed; a storage that does not answer is told, and tried again next time."""
        for backup in self._backups:
            try:
                backup.save()
            except OSError as error:
                logger.error("not backed up: %s", error)

    def stop(self) -> None:
        """The server and its workers."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def watch(server: Server, stop: threading.Event, ray_port: int | None, every_s: float) -> int:
    """Back up every ``every_s``, and when Ray ends; until it has ended for a minute.

    `ray down` ends Ray before the machine, and leaves machines that are not the cloud's.

    Returns:
        The exit code.
    """
    waited, gone_s, ray_was_up = 0.0, 0.0, False
    while not stop.wait(LOOK_S):
        code = server.ended()
        if code is not None:
            logger.error("MLflow ended with code %d, started again", code)
            server.start()
        waited += LOOK_S
        ray_is_up = ray_port is not None and _listens(ray_port)
        if waited >= every_s or (gone_s == 0.0 and ray_was_up and not ray_is_up):
            server.back_up()
            waited = 0.0
        ray_was_up = ray_was_up or ray_is_up
        gone_s = gone_s + LOOK_S if ray_was_up and not ray_is_up else 0.0
        if gone_s >= LEAVE_S:
            break
    return 0


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(main())
