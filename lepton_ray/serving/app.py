"""The HTTP application of the version that a reference names, on Ray Serve.

No ``from __future__ import annotations`` here: Serve pickles the class, and FastAPI could no longer
find what its annotations name.
"""

import asyncio
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayError

from lepton_ray.config.schema import Serve
from lepton_ray.data.schema import Schema
from lepton_ray.errors import LeptonRayError
from lepton_ray.serving.follower import Files, write_files
from lepton_ray.serving.requests import (
    Columns,
    Response,
    RowsError,
    ValueResponse,
    columns_of,
    row_schema,
)
from lepton_ray.serving.runtime import Runtime

MAX_BODY_BYTES = 16 << 20
ASK_S = 1.0  # between two looks for a new version
MAX_QUEUED = 1000  # requests waiting at a proxy; more are answered 503 at once


def application(follower: Any, folder: Path, name: str, config: Serve) -> serve.Application:
    """A Serve application that answers with the version `follower.Follower` names.

    Args:
        follower: handle of the actor.
        folder: of its present version, for the types of requests and answers.
    """
    schema = Schema.from_json(json.loads((folder / "schema.json").read_text()))
    api = FastAPI(title=name, description="Served by lepton_ray.")
    deployment: Any = serve.deployment(serve.ingress(api)(_define(api, schema, config)))
    replicas = config.replicas
    scale: dict[str, Any] = (
        {"num_replicas": replicas.min}
        if replicas.min == replicas.max
        else {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "upscale_delay_s": 3,
                "downscale_delay_s": 30,
            }
        }
    )
    bound: serve.Application = deployment.options(
        name=name,
        # A batch fills only when this many requests may be in a replica; two, so that one waits
        # while the other runs.
        max_ongoing_requests=2 * config.batch.max,
        max_queued_requests=MAX_QUEUED,
        ray_actor_options={"num_cpus": 1},
        **scale,
    ).bind(follower, name)
    return bound


def _define(api: FastAPI, schema: Schema, config: Serve) -> type:
    """The deployment's class; its batching is fixed by the experiment."""
    kind = Response if schema.classes else ValueResponse

    class Endpoint:
        async def __init__(self, follower: Any, name: str) -> None:  # type: ignore[misc]
            self._follower = follower
            self._name = name
            self._problem = ""
            version, files = await follower.current.remote()
            self._runtime = await asyncio.to_thread(_load, await files, name, version)
            # One thread: the forward pass stays off the event loop, which answers health checks.
            self._thread = ThreadPoolExecutor(max_workers=1)
            self._following = asyncio.create_task(self._follow())

        async def _follow(self) -> None:
            """Change to each version that is named anew; requests go on meanwhile."""
            refused = 0
            while True:
                await asyncio.sleep(ASK_S)
                try:
                    version, files = await self._follower.current.remote()
                    if version in (self._runtime.version, refused):
                        continue
                    new = await asyncio.to_thread(_load, await files, self._name, version)
                except (RayError, LeptonRayError) as error:
                    self._problem = f"cannot follow: {error}"
                    continue
                if (new.schema.classes, _types(new.schema)) != (schema.classes, _types(schema)):
                    refused = version
                    self._problem = (
                        f"version {version} takes other columns or answers other classes: "
                        "start its endpoint anew"
                    )
                    continue
                self._runtime, self._problem = new, ""

        @serve.batch(
            max_batch_size=config.batch.max,
            batch_wait_timeout_s=config.batch.wait_ms / 1000,
            batch_size_fn=_rows_of,
        )
        async def _batched(self, requests: list[Columns]) -> list[Any]:
            """For each request the runtime that answers, and its part of the answers."""
            runtime = self._runtime
            merged = {
                name: np.concatenate([columns[name] for columns in requests])
                for name in requests[0]
            }
            loop = asyncio.get_running_loop()
            whole = await loop.run_in_executor(self._thread, runtime.predict_columns, merged)
            ends = np.cumsum([_length(columns) for columns in requests])[:-1]
            return [(runtime, part) for part in np.split(whole, ends)]

        @api.post("/predict", response_model=kind, openapi_extra={"requestBody": _body(schema)})
        async def predict(self, request: Request) -> Any:
            """The answer to each row: class probabilities, or a value."""
            try:
                rows = await _read_rows(request)
                runtime, part = await self._batched(columns_of(schema, rows))
                answers = runtime.answers(part)
            except RowsError as error:
                return JSONResponse({"detail": [vars(p) for p in error.problems]}, 422)
            except _RefusedError as error:
                return JSONResponse({"detail": str(error)}, error.status)
            return kind(
                model=runtime.name,
                version=runtime.version,
                predictions=answers,
            )

        @api.get("/health")
        async def health(self) -> dict[str, Any]:
            """Which version answers, and what keeps it from following its alias, if anything."""
            version = self._runtime.version
            problem = {"problem": self._problem} if self._problem else {}
            return {"status": "ok", "model": self._name, "version": version, **problem}

    return Endpoint


def _load(files: Files, name: str, version: int) -> Runtime:
    """A version from its files, warm.

    Raises:
        ModelError: when they were changed or are of a newer format.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(files, Path(folder))
        runtime = Runtime.load(Path(folder), name=name, version=version)
    runtime.warm_up()
    return runtime


def _types(schema: Schema) -> list[tuple[Any, ...]]:
    """What a request's columns must be; ranges and categories may differ between versions."""
    return [(c.name, c.kind, c.shape) for c in schema.columns]


class _RefusedError(Exception):
    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


async def _read_rows(request: Request) -> list[dict[str, Any]]:
    """The rows of a body ``{"rows": [...]}``.

    Raises:
        _RefusedError: with the HTTP status, when the body is too large or of another form.
    """
    limit = f"a body has at most {MAX_BODY_BYTES} bytes"
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _RefusedError(413, f"{limit}, but this has {declared}: send fewer rows")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _RefusedError(413, f"{limit}: send fewer rows")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(422, f"the body must be JSON: {error}") from None
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows or set(value) != {"rows"}:
        raise _RefusedError(422, 'the body must be {"rows": [{...}, ...]} with at least one row')
    return rows


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _rows_of(requests: list[Any]) -> int:
    """A request counts as many as its rows, so that a batch is bounded in rows."""
    return sum(_length(columns) for columns in requests)


def _body(schema: Schema) -> dict[str, Any]:
    """The request's type for the OpenAPI page; the endpoint checks it in one pass of NumPy."""
    body = {
        "type": "object",
        "properties": {"rows": {"type": "array", "minItems": 1, "items": row_schema(schema)}},
        "required": ["rows"],
        "additionalProperties": False,
    }
    return {"required": True, "content": {"application/json": {"schema": body}}}
