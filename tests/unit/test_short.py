"""Which requests come past Serve into a replica's application, and that they are answered alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from lepton_ray.serving import guard, keys, short
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.runtime import Runtime
from tests import apps

BODY = {"rows": [{"age": 7, "city": "Rom"}]}
TENSORS = {
    "id": "1",
    "inputs": [
        {"name": "age", "datatype": "FP64", "shape": [1], "data": [7]},
        {"name": "city", "datatype": "BYTES", "shape": [1], "data": ["Rom"]},
    ],
}


@pytest.fixture
def nothing_offered() -> Iterator[None]:
    yield
    short._offered = None


async def serve(scope: Scope, receive: Receive, send: Send) -> None:
    """In place of Ray Serve."""
    await PlainTextResponse("serve")(scope, receive, send)


async def ask(path: str, method: str = "POST", **options: Any) -> httpx.Response:
    (made,) = short.middleware()
    transport = httpx.ASGITransport(made.cls(serve, *made.args, **made.kwargs))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)


@pytest.mark.usefixtures("nothing_offered")
def test_predictions_take_the_short_way_and_all_else_serve_s(people: Runtime) -> None:
    app = apps.app(people)
    app.asgi._echo = False  # as in a replica, where Serve's own middleware echoes

    async def asked() -> None:
        assert (await ask("/predict", json=BODY)).text == "serve", "nothing is offered yet"
        short.offer(app.asgi)
        answer = await ask("/predict", json=BODY, headers={"x-request-id": "r-1"})
        assert answer.json() == expected
        assert answer.headers.get_list("x-request-id") == ["r-1"]
        assert (await ask("/predict?top_k=1", json=BODY)).json()["version"] == 3
        assert (await ask("/predict", json={"rows": []})).status_code == 422
        for path in ("/v2/models/people/infer", "/v2/models/people/versions/3/infer"):
            assert (await ask(path, json=TENSORS)).json() == inferred, path
        assert (await ask("/explain", json=BODY)).status_code == 404, "it was not asked for"
        others = ("/health", "/explain/", "/predict/", "/v2/models/people", "/-/healthz")
        for path in (*others, "/v2/models/people/infer/more"):
            assert (await ask(path)).text == "serve", path

    expected = app.post("/predict", json=BODY).json()
    inferred = app.post("/v2/models/people/infer", json=TENSORS).json()
    assert inferred["outputs"]
    asyncio.run(asked())
    asyncio.run(in_another_loop())


async def in_another_loop() -> None:
    assert (await ask("/predict", json=BODY)).text == "serve", "the application runs elsewhere"


@pytest.mark.usefixtures("nothing_offered")
def test_the_short_way_has_keys_a_queue_and_clients_that_go(
    people: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HELD_S", 0.05)  # or the first answer takes long
    text, key = keys.make("one", ("predict",), None)
    app = apps.app(people, Keyring((key,)), queue=1)
    given = {"authorization": f"Bearer {text}"}

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def asked() -> None:
        go_on = asyncio.Event()
        app.local.before = go_on.wait
        short.offer(app.asgi)
        assert (await ask("/predict", json=BODY)).status_code == 401
        first = asyncio.create_task(ask("/predict", json=BODY, headers=given))
        while not app.asgi.inside:
            await asyncio.sleep(0.01)
        assert (await ask("/predict", json=BODY, headers=given)).status_code == 429
        go_on.set()
        assert (await first).status_code == 200
        headers = [(name.encode(), value.encode()) for name, value in given.items()]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"",
                 "headers": headers, "client": ("127.0.0.1", 1)}  # fmt: skip
        await short.Short(serve)(scope, gone, nowhere)
        assert app.lines[-1]["status"] == 499
        assert app.asgi.inside == 0

    asyncio.run(asyncio.wait_for(asked(), 60))


@pytest.mark.usefixtures("nothing_offered")
@pytest.mark.parametrize("query", [b"", b"method=occlusion"])
def test_an_explanation_is_taken_back_when_its_client_goes(people: Runtime, query: bytes) -> None:
    app = apps.app(people, explainer=object())
    said: list[str] = []

    async def explain(*question: Any) -> str:
        said.append("asked")
        try:
            await go_on.wait()
            return '{"explanations": []}'
        finally:
            said.append("over")

    go_on = asyncio.Event()
    app.local.explain = explain
    scope = {"type": "http", "method": "POST", "path": "/explain", "query_string": query,
             "headers": [], "client": ("127.0.0.1", 1)}  # fmt: skip

    async def asked() -> None:
        messages = iter([{"type": "http.request", "body": json.dumps(BODY).encode()}])

        async def receive() -> dict[str, Any]:
            if message := next(messages, None):
                return message
            while "asked" not in said:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """What comes too late goes nowhere."""

        short.offer(app.asgi)
        await short.Short(serve)(scope, receive, send)
        while "over" not in said:
            await asyncio.sleep(0.01)
        assert (said, app.lines[-1]["status"]) == (["asked", "over"], 499)
        assert (await ask("/predict", json=BODY)).status_code == 200
        go_on.set()
        answer = await ask("/explain", json=BODY)
        assert answer.json() == {"explanations": []}, "who stays is answered"

    asyncio.run(asyncio.wait_for(asked(), 60))


async def nowhere(message: Any) -> None:
    raise AssertionError(f"nobody is there to be told {message}")


@pytest.mark.usefixtures("nothing_offered")
def test_while_answers_take_long_serve_watches_for_clients_that_go(
    people: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short, "SLOW_S", 0.2)
    app = apps.app(people)

    async def asked() -> None:
        app.local.before = lambda: asyncio.sleep(0.3)
        short.offer(app.asgi)
        assert (await ask("/predict", json=BODY)).json()["version"] == 3
        assert (await ask("/predict", json=BODY)).text == "serve"
        app.local.before = None
        assert (await app.later("GET", "/health")).status_code == 200
        assert (await ask("/predict", json=BODY)).text == "serve", "no model has answered quicker"
        await app.later("POST", "/predict", json=BODY)
        assert (await ask("/predict", json=BODY)).json()["version"] == 3

    asyncio.run(asked())
