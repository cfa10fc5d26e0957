"""Requests made from the endpoint's own description, and hostile ones over and over."""

from __future__ import annotations

import os
import random
import re

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lepton_ray.serving import guard, keys
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.runtime import Runtime
from tests import apps

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 30  # of each route
BODIES = 200
GROWTH_MB = 60  # an allocator keeps some; a leak of these bodies would be many times as much


@pytest.fixture(scope="module", params=["people", "digits"])
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> apps.App:
    make = {"people": apps.people, "digits": apps.digits}[request.param]
    return apps.app(make(tmp_path_factory.mktemp(request.param)), body_mb=1)


def test_whatever_the_description_allows_is_answered_as_it_says(app: apps.App) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app.asgi)
    asked = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case) -> None:
            response = case.call()
            case.validate_response(response, checks=CHECKS)
            asked.append((case.path, response.status_code))

        ask()
    assert {path for path, _ in asked} >= {"/predict", "/health", "/v2/models/{model}/infer"}
    assert ("/predict", 200) in asked, "some of what it allows is answered"


def test_hostile_bodies_over_and_over_keep_nothing(app: apps.App) -> None:
    rng = random.Random(0)
    good = b'{"rows": [{"age": 7, "city": "Rom"}]}'
    hostile = [
        lambda: good[: rng.randrange(len(good))],
        lambda: b'{"rows": [' + b"[" * rng.randrange(200_000),
        lambda: b'{"rows": [{"age": NaN, "city": "Rom"}]}',
        lambda: b'{"rows": [' + b",".join([b"{}"] * rng.randrange(20_000)) + b"]}",
        lambda: b'{"rows": [{"age": 1' + b"0" * rng.randrange(300_000) + b"}]}",
        lambda: b'{"rows": [{"' + b"k" * rng.randrange(500_000) + b'": 1}]}',
        lambda: rng.randbytes(rng.randrange(1_000_000)),
        lambda: b"\x89PNG\r\n\x1a\n" + rng.randbytes(10_000),
    ]
    kinds = ["application/json", "image/png", "text/csv"]
    process = psutil.Process(os.getpid())

    def send(n: int) -> None:
        for number in range(n):
            body = hostile[number % len(hostile)]()
            kind = kinds[number // len(hostile) % len(kinds)]
            answer = app.post("/predict", content=body, headers={"content-type": kind})
            assert answer.status_code in (200, 413, 415, 422), answer.text[:200]

    send(BODIES // 4)  # what is set up once, and the largest of each
    before = process.memory_info().rss
    send(BODIES)
    assert process.memory_info().rss - before < GROWTH_MB * 1e6


def test_the_pages_of_routes_need_no_internet(people: Runtime) -> None:
    app = apps.app(people)
    for page in ("/docs", "/redoc"):
        loaded = re.findall(r'(?:src|href)="([^"]+)"', app.get(page).text)
        assert any(path.endswith(".js") for path in loaded)
        assert [app.get(path).status_code for path in loaded] == [200] * len(loaded)


def test_the_description_says_what_needs_a_key(people: Runtime) -> None:
    key, entry = keys.make("a", ("predict",), None)
    guarded = apps.app(people, Keyring((entry,)))
    said = guarded.get("/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
    for path, operations in said["paths"].items():
        for operation in operations.values():
            needed = guard.scope_for(path) is not None
            assert ("security" in operation, "401" in operation["responses"]) == (needed, needed)
    assert said["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    plain = apps.app(people).get("/openapi.json").json()
    assert "securitySchemes" not in plain["components"]
