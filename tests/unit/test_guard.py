"""Who is let in to an endpoint, how much of it, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_ray.cli import main
from lepton_ray.config.schema import Serve
from lepton_ray.errors import ServingError
from lepton_ray.serving import endpoint, followers, guard, keys
from lepton_ray.serving.access import MOST, AccessLog
from lepton_ray.serving.board import FORGET_S, GONE_S, Board
from lepton_ray.serving.follower import About, Follower, KeySource
from lepton_ray.serving.guard import needs_keys
from lepton_ray.serving.keys import Key, Keyring
from lepton_ray.serving.metrics import Metrics, page
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.runtime import Runtime
from lepton_ray.serving.told import Told
from lepton_ray.tracking import endpoints
from tests import apps

ROW = {"age": 7, "city": "Rom"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def keyed(runtime: Runtime, rate: float | None = None, **limits: Any) -> tuple[apps.App, dict]:
    """An application, and a header with a key of each scope."""
    made = {s: keys.make(s, (s,), rate) for s in keys.SCOPES}
    ring = Keyring(tuple(key for _, key in made.values()))
    headers = {s: {"authorization": f"Bearer {text}"} for s, (text, _) in made.items()}
    return apps.app(runtime, ring, **limits), headers


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "file", "needed"),
    [
        ("127.0.0.1", None, False),
        ("127.8.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("127.0.0.1", "k.json", True),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("10.0.0.7", None, True),
        ("::ffff:10.0.0.7", None, True),
        ("localhost.example.org", None, True),
        ("", None, True),
    ],
)
def test_only_what_this_machine_alone_can_reach_needs_no_key(
    host: str, file: str | None, needed: bool
) -> None:
    assert needs_keys(host, file) is needed


def test_without_a_valid_key_every_route_but_the_bare_page_and_health_is_401(
    people: Runtime,
) -> None:
    app, headers = keyed(people)
    good = headers["predict"]["authorization"]
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer lr-00000000-" + "0" * 64,
        good[:-1] + ("0" if good[-1] != "0" else "1"),
        good[:-1],
        good + "0",
        good.removeprefix("Bearer "),
        good.replace("Bearer", "Basic"),
        "Bearer " + keys.make("x", ("admin",), None)[0],
        "Bearer " + "é" * 100,
    ]
    routed = app.asgi._app._app  # behind the guard and the short way
    paths = [route.path for route in routed.routes] + ["/nope", "/metrics/"]
    paths.append("http://endpoint//metrics")  # whole, or the two slashes would name a host
    assert {"/predict", "/docs", "/openapi.json", "/v2", "/health", "/metrics"} <= set(paths)
    closed = [path for path in paths if path != "/" and not path.startswith("/v2/health/")]
    assert len(set(paths)) - len(set(closed)) == 3
    for path in closed:
        for method in ("GET", "POST", "OPTIONS"):
            answer = app.ask(method, path)
            assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer")
    for header in wrong:
        answer = app.post("/predict", headers={"authorization": header.encode()}, json={})
        assert answer.status_code == 401, header
        assert answer.json() == {"detail": "a valid key is needed: Authorization: Bearer KEY"}
    bare = app.get("/")
    assert bare.status_code == 200
    assert not any(word in bare.text for word in (people.name, '"city"', '"age"'))
    assert '"city"' in app.get("/page.json", headers=headers["predict"]).text
    assert app.get("/v2/health/live").json() == {"live": True}
    assert app.get("/v2/health/ready").json() == {"ready": True}
    assert app.get("/v2").json() == {"error": "a valid key is needed: Authorization: Bearer KEY"}


def test_a_key_is_let_in_where_its_scope_says(people: Runtime) -> None:
    app, headers = keyed(people)
    tried = {
        (scope, path): app.ask(method, path, headers=headers[scope], **body).status_code
        for scope in headers
        for method, path, body in [
            ("POST", "/predict", {"json": {"rows": [ROW]}}),
            ("GET", "/metrics", {}),
        ]
    }
    assert tried == {
        ("predict", "/predict"): 200,
        ("predict", "/metrics"): 403,
        ("explain", "/predict"): 403,
        ("explain", "/metrics"): 403,
        ("admin", "/predict"): 200,
        ("admin", "/metrics"): 200,
    }
    said = app.get("/metrics", headers=headers["predict"]).json()["detail"]
    assert "needs a key of scope admin" in said
    assert said.endswith("has predict")


def test_a_rate_is_granted_in_parts_by_replicas_and_comes_back_with_time() -> None:
    text, key = keys.make("a", ("predict",), 10)

    def granted(ring: Keyring, now_s: float) -> int:
        count = 0
        while count < 99 and granted_one(ring, text, now_s):
            count += 1
        return count

    ring = Keyring((key,))
    assert [granted(ring, at) for at in (0.0, 0.0, 0.5, 100.0)] == [10, 0, 5, 10]
    ring.replace((key,), replicas=5)
    assert granted(ring, 100.0) == 0, "a look at the file gives nothing back"
    assert granted(ring, 200.0) == 2
    with pytest.raises(RefusedError, match="has 10 requests a second") as caught:
        ring.admit(f"Bearer {text}", "predict", 200.0)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 0.5)
    slow = Keyring((Key(key.id, "b", key.sha256, ("predict",), 0.1),))
    assert [granted_one(slow, text, at) for at in (0.0, 9.0, 10.0)] == [True, False, True]


def granted_one(ring: Keyring, text: str, now_s: float) -> bool:
    try:
        ring.admit(f"Bearer {text}", "predict", now_s)
    except RefusedError:
        return False
    return True


def test_a_rate_over_http_is_429_and_says_when(people: Runtime) -> None:
    app, headers = keyed(people, rate=0.01)
    sent = {"json": {"rows": [ROW]}, "headers": headers["predict"]}
    assert app.post("/predict", **sent).status_code == 200
    answer = app.post("/predict", **sent)
    assert answer.status_code == 429
    assert 90 <= int(answer.headers["retry-after"]) <= 100
    assert app.post("/predict", json={}, headers=headers["admin"]).status_code == 422


def test_the_file_keeps_no_key_and_is_its_owners(file: Path) -> None:
    text = keys.create(file, "site", ("predict",), 5.0)
    assert file.stat().st_mode & 0o777 == 0o600
    assert text not in file.read_text()
    assert text.split("-")[2] not in file.read_text()
    (key,) = keys.read(file)
    assert (key.name, key.scopes, key.rate_per_s) == ("site", ("predict",), 5.0)
    assert Keyring((key,)).admit(f"Bearer {text}", "predict", 0.0) == key
    with pytest.raises(ServingError, match="named 'site' already"):
        keys.create(file, "site", ("admin",), None)
    file.chmod(0o640)
    with pytest.raises(ServingError, match="open to its owner only, but has mode 640: chmod 600"):
        keys.read(file)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": 2, "keys": []}',
        '{"format": 1, "keys": [{}]}',
        '{"format": 1, "keys": [{"id": "a", "name": "a", "sha256": "", "scopes": []}]}',
    ],
)
def test_a_damaged_file_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ServingError, match="cannot be read"):
        keys.read(file)


def test_keys_of_the_command_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = ["--file", str(file), "--json"]

    def said(*arguments: str) -> dict:
        assert main(["keys", *arguments, *of]) == 0
        return json.loads(capsys.readouterr().out)

    text = said("create", "site", "--scope", "predict", "--scope", "explain", "--rate", "2")["key"]
    said("create", "other")
    listed = said("list")["keys"]
    assert [(k["name"], k["scopes"], k["rate_per_s"]) for k in listed] == [
        ("site", ["predict", "explain"], 2.0),
        ("other", ["predict"], None),
    ]
    assert text.split("-")[1] == said("revoke", "site")["id"]
    assert [k["name"] for k in said("list")["keys"]] == ["other"]
    assert main(["keys", "revoke", "sote", *of]) == 2
    assert main(["keys", "create", *of]) == 2


def test_an_endpoint_that_others_reach_does_not_start_without_keys(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert endpoint._keys(Serve()) == (None, None)
    for config in (Serve(host="0.0.0.0"), Serve(keys=str(file))):
        with pytest.raises(ServingError, match="needs keys, as .* lepton-ray keys create"):
            endpoint._keys(config)
    text = keys.create(file, "site", ("predict",), None)
    with pytest.raises(ServingError, match=keys.DEFAULT_FILE):
        endpoint._keys(Serve(host="0.0.0.0"))
    source, own = endpoint._keys(Serve(keys=str(file)))
    assert source is not None
    ring = Keyring(source.read())
    for one in (text, own):
        ring.admit(f"Bearer {one}", "predict", 0.0)
    keys.revoke(file, "site")
    ring.replace(source.read(), replicas=1)
    with pytest.raises(RefusedError, match="a valid key"):
        ring.admit(f"Bearer {text}", "predict", 0.0)


def test_a_key_file_that_is_lost_lets_nobody_in(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "report", lambda name, said: None)
    keys.create(file, "site", ("predict",), None)
    follower = Follower("people/1", "e", "http://people", KeySource(file))
    monkeypatch.setattr(follower, "_find", lambda: (1, endpoints.Tried(), {}, {}))

    async def present() -> Any:
        return await follower.present("r", Told({}, "", {}, {}))

    async def look_twice() -> list[Any]:
        first = await present()
        file.unlink()
        await follower._look()
        follower._following.cancel()  # type: ignore[union-attr]
        return [first, await present()]

    first, now = asyncio.run(look_twice())
    assert len(first.keys) == 1
    assert now.keys == ()
    assert "no key is accepted" in now.problem


def test_a_key_for_a_while(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create(file, "site", ("predict",), None)
    following = Follower("people/1", "e", "http://people", KeySource(file))
    _, entry = keys.make("a run", ("predict",), None)

    async def accepted() -> list[int]:
        await following.admit(entry)
        during = len(following._keys)
        await following.dismiss(entry)
        return [during, len(following._keys)]

    assert asyncio.run(accepted()) == [2, 1]
    about = asyncio.run(following.about())
    assert (about.reference, about.url, about.guarded) == ("people/1", "http://people", True)


# --- who serves a model on a cluster --------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "age_s", "served", "share", "free"),
    [
        ("people@champion", 900, True, False, False),
        ("people/1", 900, True, False, False),
        ("people@champion", 5, False, False, False),  # it is being started
        ("people@champion", 900, False, False, True),  # what a killed command has left
        ("people@champion", 900, True, True, True),
        ("people/1", 900, True, True, False),
    ],
)
def test_a_model_is_served_once_on_a_cluster(
    reference: str,
    age_s: float,
    served: bool,
    share: bool,
    free: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    about = About("e", "people@champion", "http://people", False, age_s, "version 1")
    monkeypatch.setattr(followers, "find", lambda name: (None, about) if name == "people" else None)
    status = SimpleNamespace(applications={"people": 1} if served else {})
    monkeypatch.setattr(endpoint.serve, "status", lambda: status)
    endpoint.check_free("another@champion")
    if free:
        endpoint.check_free(reference, share=share)
        return
    with pytest.raises(ServingError, match="people@champion at http://people.*serve people --stop"):
        endpoint.check_free(reference, share=share)


# --- limits --------------------------------------------------------------------------------------


def test_more_than_the_queue_is_429_and_the_queue_is_answered(people: Runtime) -> None:
    app = apps.app(people, queue=3)
    free = asyncio.Event()
    app.local.before = free.wait

    async def ask() -> list[int]:
        asked = [
            asyncio.create_task(app.later("POST", "/predict", json={"rows": [ROW]}))
            for _ in range(8)
        ]
        async with asyncio.timeout(10):
            while sum(task.done() for task in asked) < 5:
                await asyncio.sleep(0.01)
        refused = [task.result() for task in asked if task.done()]
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        assert (await app.later("GET", "/v2/health/live")).status_code == 200
        free.set()
        return [(await task).status_code for task in asked]

    assert sorted(asyncio.run(ask())) == [200] * 3 + [429] * 5
    assert app.post("/predict", json={"rows": [ROW]}).status_code == 200


def test_who_comes_too_often_waits_for_the_refusal_and_takes_no_room(
    people: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = apps.app(people, queue=1)
    monkeypatch.setattr(guard, "HELD_S", 60.0)
    monkeypatch.setattr(guard, "HELD", 2)

    async def ask() -> None:
        def asked() -> asyncio.Task[Any]:
            return asyncio.create_task(app.later("POST", "/predict", json={"rows": [ROW]}))

        go_on = asyncio.Event()
        app.local.before = go_on.wait
        first = asked()
        while not app.asgi.inside:
            await asyncio.sleep(0.01)
        kept = [asked(), asked()]
        at_once = await asked()  # no more than so many are kept waiting
        assert at_once.status_code == 429
        go_on.set()
        assert (await first).status_code == 200
        assert (await asked()).status_code == 200
        assert not any(task.done() for task in kept)
        for task in kept:
            task.cancel()
        await asyncio.gather(*kept, return_exceptions=True)
        assert app.asgi.inside == 0

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_an_answer_that_takes_too_long_is_503(people: Runtime) -> None:
    app = apps.app(people, timeout_s=0.05)
    app.local.before = asyncio.Event().wait
    answer = app.post("/predict", json={"rows": [ROW]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json() == {"detail": "no answer within 0.05 s: send fewer rows"}


def test_a_body_that_takes_too_long_is_408_and_gives_its_room_back(people: Runtime) -> None:
    app = apps.app(people, timeout_s=0.05)

    async def slow() -> Any:
        yield b'{"rows": '
        await asyncio.sleep(60)

    answer = app.post("/predict", content=slow())
    assert answer.status_code == 408
    assert "the body must arrive within 0.05 s" in answer.json()["detail"]
    assert app.post("/predict", json={"rows": [ROW]}).status_code == 200


def test_bodies_that_together_are_too_large_are_429(people: Runtime) -> None:
    app = apps.app(people, body_mb=0.001)
    free = asyncio.Event()
    app.local.before = free.wait
    row = json.dumps({"rows": [ROW]}).encode().ljust(1000)

    async def ask() -> list[int]:
        asked = [asyncio.create_task(app.later("POST", "/predict", content=row)) for _ in range(20)]
        async with asyncio.timeout(10):
            while sum(task.done() for task in asked) < 4:
                await asyncio.sleep(0.01)
        free.set()
        return [(await task).status_code for task in asked]

    assert sorted(asyncio.run(ask())) == [200] * 16 + [429] * 4
    assert app.post("/predict", content=row).status_code == 200


# --- what is told --------------------------------------------------------------------------------


def test_the_access_log_is_written_soon_whole_and_rotated(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    def written(name: str = "access.log") -> list[int]:
        text = (tmp_path / name).read_text() if (tmp_path / name).exists() else ""
        return [json.loads(line)["number"] for line in text.splitlines()]

    async def write() -> None:
        log = AccessLog(path, max_bytes=100_000, backups=1)
        log({"number": 0})
        async with asyncio.timeout(60):
            while not written():
                await asyncio.sleep(0.01)
        for number in range(1, MOST + 1):
            log({"number": number})
        assert written() == list(range(MOST + 1)), "so many are not kept waiting"
        for number in range(MOST + 1, 3 * MOST):
            log({"number": number, "client": "c" * 100})
        log.flush()

    asyncio.run(write())
    assert written()[-1] == 3 * MOST - 1
    assert written("access.log.1"), "the file before"


@pytest.mark.parametrize("path", ["/predict", "/predict?top_k=1"])
def test_an_unexpected_error_tells_its_request_and_nothing_of_the_inside(
    path: str, people: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the short way, and through the framework."""
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    app = apps.app(people)

    def fail() -> None:
        raise RuntimeError("secret /path")

    app.local.before = fail
    answer = app.post(path, json={"rows": [ROW]}, headers={"x-request-id": "r-1"})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "unexpected error, in the log as request r-1"}
    assert "secret /path" in caplog.text
    assert "r-1" in caplog.text
    assert "lepton_ray_failures_total 1.0" in app.get("/metrics").text


def test_a_client_that_goes_is_noted_and_its_room_given_back(people: Runtime) -> None:
    app = apps.app(people)

    async def go() -> None:
        async def receive() -> dict:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        await app.asgi({**scope, "query_string": b""}, receive, pytest.fail)
        app.local.before = asyncio.Event().wait
        left = asyncio.create_task(app.later("POST", "/predict", json={"rows": [ROW]}))
        await asyncio.sleep(0.05)
        left.cancel()
        await asyncio.wait([left])

    asyncio.run(go())
    assert [line["status"] for line in app.lines] == [499, 499]
    assert "lepton_ray_in_flight 1.0" in app.get("/metrics").text


@pytest.mark.parametrize(
    ("given", "kept"), [("a.b_c:D-9", True), ("a" * 129, False), ("a b", False), ('"', False)]
)
def test_a_request_id_goes_back_and_into_the_log(people: Runtime, given: str, kept: bool) -> None:
    app = apps.app(people)
    answer = app.get("/nope", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is kept
    assert app.lines[-1]["id"] == answer.headers["x-request-id"]
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_the_access_log_has_a_line_a_request_and_nothing_that_was_sent(people: Runtime) -> None:
    app, headers = keyed(people)
    secret = headers["predict"]["authorization"]
    for path in ("/predict", "/predict?token=Hidden", "/Hidden"):
        row = {"age": 1, "city": "Hidden"}
        app.post(path, json={"rows": [row]}, headers=headers["predict"])
    assert [line["status"] for line in app.lines] == [200, 422, 404]
    text = json.dumps(app.lines)
    assert "Hidden" not in text
    assert secret.split("-")[2] not in text
    line = app.lines[0]
    assert (line["route"], line["status"], line["rows"], line["version"]) == ("/predict", 200, 1, 3)
    assert line["key"] == secret.split("-")[1]
    assert app.lines[2]["route"] == "none"


def test_the_metrics_count_requests_rows_errors_and_versions(people: Runtime) -> None:
    app = apps.app(people)
    app.local.counts.serves("people", 3)
    app.post("/predict", json={"rows": [ROW] * 5})
    app.post("/predict", json={"rows": [{}]})
    for n in range(50):
        app.get(f"/v2/models/{n}")
        app.get(f"/{n}")
    text = app.get("/metrics").text
    for line in [
        'lepton_ray_requests_total{route="/predict",status="200",version="3"} 1.0',
        'lepton_ray_requests_total{route="/predict",status="422",version=""} 1.0',
        'lepton_ray_requests_total{route="/v2/models/{model}",status="404",version=""} 50.0',
        'lepton_ray_requests_total{route="none",status="404",version=""} 50.0',
        'lepton_ray_rows_total{version="3"} 5.0',
        'lepton_ray_model_info{model="people",version="3"} 1.0',
        "lepton_ray_in_flight 1.0",
        'lepton_ray_request_seconds_count{route="/predict"} 2.0',
    ]:
        assert line in text.splitlines()


def test_counts_of_replicas_add_up_and_stay_when_one_is_gone() -> None:
    def counted(requests: int) -> Metrics:
        metrics = Metrics()
        metrics.serves("m", 1)
        for _ in range(requests):
            metrics.answered(route="/predict", status=200, seconds=0.1, rows=2, version=1)
        return metrics

    def lines(now_s: float) -> set[str]:
        return {line for line in page(board.totals(now_s)).decode().splitlines() if "#" not in line}

    rows, bucket = "lepton_ray_rows_total", "lepton_ray_request_seconds_bucket"
    board = Board()
    board.note("a", counted(3).snapshot(), 0.0)
    board.note("b", counted(4).snapshot(), 0.0)
    board.note("a", counted(5).snapshot(), 1.0)
    assert board.replicas(1.0) == 2
    both = {f'{rows}{{version="1"}} 18.0', f'{bucket}{{le="0.1",route="/predict"}} 9.0'}
    info = 'lepton_ray_model_info{model="m",version="1"}'
    assert {*both, f"{info} 2.0"} <= lines(1.0)
    later = GONE_S + 0.5
    board.note("a", counted(5).snapshot(), later)
    assert board.replicas(later) == 1
    assert {*both, f"{info} 1.0"} <= lines(later)
    board.note("b", counted(4).snapshot(), later)
    assert {*both, f"{info} 2.0"} <= lines(later), "one that was only slow is not counted twice"
    for _ in range(2):
        later += FORGET_S + 1
        board.note("a", counted(5).snapshot(), later)
        assert {*both, f"{info} 1.0"} <= lines(later)
    assert board.replicas(later + FORGET_S) == 1
