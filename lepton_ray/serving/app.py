"""The HTTP application of one version on Ray Serve.

No ``from __future__ import annotations`` here: Serve pickles the class, and FastAPI could no longer
find what its annotations name.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve

from lepton_ray.config.schema import Serve
from lepton_ray.data.schema import Schema
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
MAX_QUEUED = 1000  # requests waiting at a proxy; more are answered 503 at once


def application(folder: Path, name: str, version: int, config: Serve) -> serve.Application:
    """A Serve application that answers with the version in ``folder``."""
    schema = Schema.from_json(json.loads((folder / "schema.json").read_text()))
    api = FastAPI(title=name, version=str(version), description="Served by lepton_ray.")
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
    ).bind(str(folder), name, version)
    return bound


def _define(api: FastAPI, schema: Schema, config: Serve) -> type:
    """The deployment's class; its batching is fixed by the experiment."""
    kind = Response if schema.classes else ValueResponse

    class Endpoint:
        def __init__(self, folder: str, name: str, version: int) -> None:
            self._runtime = Runtime.load(Path(folder), name=name, version=version)
            # One thread: the forward pass stays off the event loop, which answers health checks.
            self._thread = ThreadPoolExecutor(max_workers=1)

        @serve.batch(
            max_batch_size=config.batch.max,
            batch_wait_timeout_s=config.batch.wait_ms / 1000,
            batch_size_fn=_rows_of,
        )
        async def _batched(self, requests: list[Columns]) -> list[Any]:
            merged = {
                name: np.concatenate([columns[name] for columns in requests])
                for name in requests[0]
            }
            loop = asyncio.get_running_loop()
            whole = await loop.run_in_executor(self._thread, self._runtime.predict_columns, merged)
            ends = np.cumsum([_length(columns) for columns in requests])[:-1]
            return np.split(whole, ends)

        @api.post("/predict", response_model=kind, openapi_extra={"requestBody": _body(schema)})
        async def predict(self, request: Request) -> Any:
            """The answer to each row: class probabilities, or a value."""
            try:
                rows = await _read_rows(request)
                columns = columns_of(self._runtime.schema, rows)
                answers = self._runtime.answers(await self._batched(columns))
            except RowsError as error:
                return JSONResponse({"detail": [vars(p) for p in error.problems]}, 422)
            except _RefusedError as error:
                return JSONResponse({"detail": str(error)}, error.status)
            return kind(
                model=self._runtime.name,
                version=self._runtime.version,
                predictions=answers,
            )

        @api.get("/health")
        async def health(self) -> dict[str, Any]:
            """Which version answers."""
            return {"status": "ok", "model": self._runtime.name, "version": self._runtime.version}

    return Endpoint


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
