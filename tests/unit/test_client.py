"""`lepton_ray.Client`: against the real application, and against every way to fail."""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lepton_ray
from lepton_ray.errors import EndpointError, InputError, RefusedRequestError, UnavailableError
from lepton_ray.serving import client, keys
from lepton_ray.serving.client import Client, wait_s
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.runtime import Runtime
from tests import apps

Handler = Callable[[httpx.Request], httpx.Response]
ROWS = [{"age": 7, "city": "Rom"}, {"age": 8.5, "city": "Bonn"}]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds the client would have waited."""
    found: list[float] = []
    monkeypatch.setattr(client.time, "sleep", found.append)
    monkeypatch.setattr(client.random, "random", lambda: 0.5)
    return found


def of(handler: Handler, **options: object) -> Client:
    return Client("http://test/", transport=httpx.MockTransport(handler), **options)  # type: ignore[arg-type]


def reaching(app: apps.App, key: str | None = None) -> Client:
    """A client of an application in this process."""

    def answer(request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app.asgi)
            async with httpx.AsyncClient(transport=transport) as inner:
                found = await inner.request(
                    request.method, request.url, content=request.content, headers=request.headers
                )
                return httpx.Response(
                    found.status_code, content=found.content, headers=found.headers
                )

        return asyncio.run(ask())

    return Client("http://test", key, transport=httpx.MockTransport(answer))


# --- what it sends -------------------------------------------------------------------------------


def test_rows_frames_and_arrays_are_answered_as_load_model_does(
    people: Runtime, diabetes: Runtime, digits: Runtime
) -> None:
    def local(runtime: Runtime, rows: list[dict]) -> list[dict]:
        return [answer.model_dump() for answer in runtime.predict(rows)]

    told = reaching(apps.app(people)).predict(ROWS)
    assert told == {"model": "people", "version": 3, "predictions": local(people, ROWS)}
    for frame in (pd.DataFrame(ROWS), pd.DataFrame(ROWS, dtype=object), tuple(ROWS)):
        assert reaching(apps.app(people)).predict(frame) == told

    x = np.random.default_rng(0).normal(size=(4, 10))
    names = [c.name for c in diabetes.schema.columns]
    rows = [dict(zip(names, row, strict=True)) for row in x.tolist()]
    assert reaching(apps.app(diabetes)).predict(x)["predictions"] == local(diabetes, rows)
    assert [a.model_dump() for a in diabetes.predict(x)] == local(diabetes, rows)
    for ask in (reaching(apps.app(diabetes)).predict, diabetes.predict):
        with pytest.raises(InputError, match=r"must be \[n, 10\] of age, .* shape \[4, 9\]"):
            ask(x[:, :9])
        with pytest.raises(InputError, match="rows are a list, .* but got one dict"):
            ask(rows[0])

    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8))
    for given in (images, images.astype(np.float32), [{"image": i} for i in images]):
        told = reaching(apps.app(digits)).predict(given)
        assert told["predictions"] == local(digits, [{"image": i} for i in images.tolist()])
        assert [a.model_dump() for a in digits.predict(given)] == told["predictions"]
    file = io.BytesIO()
    Image.fromarray((images[0] * 255 // 16).astype(np.uint8)).save(file, "PNG")
    (of_file,) = reaching(apps.app(digits)).predict([{"image": file.getvalue()}])["predictions"]
    assert of_file["label"] == told["predictions"][0]["label"]
    cut = reaching(apps.app(digits)).predict(images, top_k=2)["predictions"]
    assert [len(p["probabilities"]) for p in cut] == [2, 2, 2]


def test_a_key_is_sent_and_a_refusal_is_typed(people: Runtime) -> None:
    text, key = keys.make("a", ("predict",), None)
    app = apps.app(people, Keyring((key,)))
    assert len(reaching(app, text).predict(ROWS)["predictions"]) == 2
    with pytest.raises(RefusedRequestError, match="401.*a valid key is needed") as caught:
        reaching(app).predict(ROWS)
    assert caught.value.status == 401
    with pytest.raises(
        RefusedRequestError, match="422.*'age'|age.*this field is required"
    ) as caught:
        reaching(app, text).predict([{"city": "Rom"}])
    assert (caught.value.status, caught.value.request_id) == (422, app.lines[-1]["id"])


# --- when it fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_endpoint_is_asked_again_after_what_it_says_and_more(
    status: int, waits: list[float]
) -> None:
    left = [httpx.Response(status, headers={"retry-after": "3"})] * 3
    told = of(lambda _: left.pop() if left else httpx.Response(200, json={"a": 1})).predict(ROWS)
    assert told == {"a": 1}
    assert waits == [3 + 0.1, 3 + 0.2, 3 + 0.4]


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectTimeout]
)
def test_an_endpoint_that_is_away_is_asked_again_and_given_up(
    error: type[Exception], waits: list[float]
) -> None:
    asked = 0

    def away(_: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        raise error("gone")

    with pytest.raises(UnavailableError, match="http://test does not answer: gone; tried 4 times"):
        of(away, tries=4).predict(ROWS)
    assert asked == 4
    assert waits == [0.1, 0.2, 0.4]


def test_an_answer_that_does_not_come_in_time_is_not_asked_for_again(waits: list[float]) -> None:
    def slow(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow")

    with pytest.raises(UnavailableError, match="slow"):
        of(slow).predict(ROWS)
    assert waits == []


@pytest.mark.parametrize("status", [301, 400, 404, 413, 422, 500])
def test_other_answers_are_not_asked_for_again(status: int, waits: list[float]) -> None:
    said = httpx.Response(status, text="why", headers={"location": "http://other"})
    with pytest.raises(RefusedRequestError, match=f"answers {status}: why") as caught:
        of(lambda _: said).predict(ROWS)
    assert isinstance(caught.value, EndpointError)
    assert caught.value.status == status
    assert waits == []


def test_a_wait_of_hours_is_not_waited(waits: list[float]) -> None:
    for text in ("7200", email.utils.formatdate(time.time() + 7200, usegmt=True)):
        said = httpx.Response(429, headers={"retry-after": text})
        with pytest.raises(UnavailableError, match="tried 1 times"):
            of(lambda _, said=said: said).predict(ROWS)
    assert waits == []


@pytest.mark.parametrize("text", ["", "-1", "soon", "²", "Mon, 01 Jan 2001 00:00:00 GMT"])
def test_a_wait_that_is_none_is_ours(text: str, waits: list[float]) -> None:
    left = [httpx.Response(503, headers={"retry-after": text.encode()})]
    of(lambda _: left.pop() if left else httpx.Response(200, json={})).predict(ROWS)
    assert waits == [0.1]


def test_waits_double_up_to_a_limit_and_are_random() -> None:
    assert [wait_s(n, 0, 0.999) for n in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.8], rel=0.01)
    assert wait_s(50, 0, 0.999) < client.LONGEST_WAIT_S
    assert wait_s(3, 5, 0.0) == 5


def test_an_answer_that_is_no_json_is_wrong() -> None:
    with pytest.raises(EndpointError, match="answers 200: <html>, which is no JSON"):
        of(lambda _: httpx.Response(200, text="<html>")).predict(ROWS)


def test_what_cannot_be_sent_is_told() -> None:
    with pytest.raises(InputError, match="begins with http:// or https://, but got 'here:8000'"):
        Client("here:8000")
    with pytest.raises(TypeError, match="must be a number, .* or an array, but got object"):
        of(lambda _: httpx.Response(200)).predict([{"age": object()}])


def test_dates_and_gaps_of_a_frame_are_sent() -> None:
    sent: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.extend(json.loads(request.content)["rows"])
        return httpx.Response(200, json={})

    joined = pd.to_datetime(["2024-01-31T10:00", None])
    frame = pd.DataFrame({"joined": joined, "n": pd.array([1, None], "Int64")})
    of(answer).predict(frame)
    assert sent == [{"joined": "2024-01-31T10:00:00", "n": 1}, {"joined": None, "n": None}]


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = (
        "import lepton_ray, sys; lepton_ray.Client('http://x');"
        "print(*sorted(sys.modules.keys() & {'torch', 'ray', 'mlflow', 'pandas', 'fastapi'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert lepton_ray.Client is Client
