"""What runs beside Ray on the machines of a cluster: copies of a database, notices of clouds."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from lepton_ray.errors import StoreError
from lepton_ray.jobs.node import spot
from lepton_ray.jobs.node.backup import Backup


def database(path: Path, *values: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("create table if not exists t (x)")
        file.executemany("insert into t values (?)", [(v,) for v in values])
        file.commit()
    return path


def held(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as file:
        return [x for (x,) in file.execute("select x from t")]


def test_a_new_machine_gets_the_last_copy(tmp_path: Path) -> None:
    first = database(tmp_path / "a" / "mlflow.db", 1)
    backup = Backup(first, f"{tmp_path}/storage")
    assert not backup.restore(), "there is nothing yet"
    assert backup.save()
    assert not backup.save(), "nothing changed"
    for value in (2, 3, 4):
        database(first, value)
        assert backup.save()
    second = tmp_path / "b" / "mlflow.db"
    assert Backup(second, f"{tmp_path}/storage").restore()
    assert held(second) == [1, 2, 3, 4]
    third = Backup(second, f"{tmp_path}/storage")
    assert not third.restore(), "a database that is there stays"


def test_a_copy_is_of_one_moment_while_others_write(tmp_path: Path) -> None:
    path = database(tmp_path / "mlflow.db", 1)
    backup = Backup(path, f"{tmp_path}/storage")
    with contextlib.closing(sqlite3.connect(path)) as writer:
        writer.execute("insert into t values (2)")  # not committed
        assert backup.save()
        writer.commit()
    Backup(tmp_path / "new" / "mlflow.db", f"{tmp_path}/storage").restore()
    assert held(tmp_path / "new" / "mlflow.db") == [1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no digest"])
def test_a_damaged_copy_gives_the_one_before(tmp_path: Path, damage: str) -> None:
    path = database(tmp_path / "mlflow.db", 1)
    backup = Backup(path, f"{tmp_path}/storage")
    backup.save()
    database(path, 2)
    backup.save()
    newest = tmp_path / "storage" / "mlflow.db.1"
    content = bytearray(newest.read_bytes())
    content[100] ^= 1
    match damage:
        case "cut":
            newest.write_bytes(content[:1000])
        case "flipped":
            newest.write_bytes(content)
        case _:
            newest.with_suffix(".1.sha256").unlink()
    fresh = tmp_path / "new" / "mlflow.db"
    again = Backup(fresh, f"{tmp_path}/storage")
    assert again.restore()
    assert held(fresh) == [1]
    database(fresh, 3)
    assert again.save(), "over the damaged one"
    assert Backup(tmp_path / "third" / "mlflow.db", f"{tmp_path}/storage").restore()
    assert held(tmp_path / "third" / "mlflow.db") == [1, 3]


def test_no_whole_copy_is_an_error_and_no_empty_database(tmp_path: Path) -> None:
    path = database(tmp_path / "mlflow.db", 1)
    Backup(path, f"{tmp_path}/storage").save()
    (tmp_path / "storage" / "mlflow.db.0").write_bytes(b"x")
    with pytest.raises(StoreError, match="no copy of mlflow.db .* is whole"):
        Backup(tmp_path / "new" / "mlflow.db", f"{tmp_path}/storage").restore()


class Metadata(BaseHTTPRequestHandler):
    """The metadata services of three clouds, as their documentation describes them."""

    taken = False
    forged: list[str]

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(200 if self.path == "/latest/api/token" and seconds else 400, "a-token")

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "a-token":
                self._answer(401, "")
            elif type(self).taken:
                self._answer(200, '{"action": "terminate", "time": "2026-11-24T08:22:00Z"}')
            else:
                self._answer(404, "")
        elif path == "/computeMetadata/v1/instance/preempted":
            flavor = self.headers.get("Metadata-Flavor")
            self._answer(200 if flavor == "Google" else 403, str(type(self).taken).upper())
        elif path == "/metadata/scheduledevents" and "api-version=2020-07-01" in query:
            events = [
                {
                    "EventType": "Preempt",
                    "Resources": [spot.socket.gethostname()],
                    "NotBefore": "Tue, 24 Nov 2026 08:22:00 GMT",
                }
            ]
            found = events if type(self).taken else []
            ok = self.headers.get("Metadata") == "true"
            self._answer(200 if ok else 400, json.dumps({"Events": found}))
        else:
            self._answer(404, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    with httpx.Client(base_url=f"http://{host!s}:{port}", trust_env=False) as client:
        yield client
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("ask", [spot.aws, spot.gcp, spot.azure])
def test_a_notice_is_read_as_the_cloud_gives_it(
    http: httpx.Client, ask: Callable[[httpx.Client], spot.Notice | None]
) -> None:
    Metadata.taken = False
    assert ask(http) is None
    Metadata.taken = True
    notice = ask(http)
    assert notice is not None
    if ask is spot.gcp:  # it says no time: 30 s from the moment on
        assert 0 < notice.at - time.time() < 30
    else:
        assert notice.at == 1795508520.0


def test_azure_takes_away_another_machine() -> None:
    event = {"EventType": "Preempt", "Resources": ["other"], "NotBefore": ""}
    assert spot.azure_notice({"Events": [event]}, "me") is None
    assert spot.azure_notice({"Events": [{**event, "EventType": "Reboot"}]}, "other") is None
    assert spot.azure_notice({"Events": [event]}, "other") is not None
