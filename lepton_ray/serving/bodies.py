"""The body of a request to ``/predict``: read within limits, and turned into rows."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request

from lepton_ray.config.schema import Limits
from lepton_ray.data.images import ImageError
from lepton_ray.data.schema import Schema
from lepton_ray.serving import images, tables
from lepton_ray.serving.guard import OVERLOADED_S, exchange_of
from lepton_ray.serving.refusals import RefusedError
from lepton_ray.serving.requests import Problem, RowsError
from lepton_ray.serving.sandbox import Sandbox

MIB = 1 << 20
JSON = "application/json"
FORM = 'the body must be {"rows": [{...}, ...]} with at least one row'
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
ARROW = "application/vnd.apache.arrow.stream"
IMAGES = ("image/png", "image/jpeg")
WAITING_BODIES = 16  # largest bodies that a replica holds at a time
SMALL = 1 << 16  # bytes that the event loop can afford to parse
ROW = 64  # bytes that a row is taken for, where only their number is known
T = TypeVar("T")


def types_for(schema: Schema) -> tuple[str, ...]:
    """The Content-Types that a model takes."""
    if any(c.kind == "image" for c in schema.columns):
        return (JSON, *IMAGES)
    if any(c.kind == "series" for c in schema.columns):
        return (JSON,)  # a row holds lists
    return (JSON, CSV, PARQUET, ARROW)


class Bodies:
    """Of one replica: reads them within limits, each and all together, and makes rows of them."""

    def __init__(self, schema: Schema, limits: Limits) -> None:
        self._schema = schema
        self._limits = limits
        self._most = int(limits.body_mb * MIB)
        self._unpacked = int(limits.decoded_mb * MIB)
        self._held = [0]  # bytes of all bodies, which each `Reading` adds its own to
        # Of any size: each may take 256 MiB until it is scaled, so they go one after the other.
        self._any_size = any(c.resized for c in schema.columns)
        self._one = asyncio.Lock()
        # Python's objects take several times what they are made of.
        self._sandbox = Sandbox(4 * self._unpacked + 256 * MIB)

    def read(self, request: Request) -> Reading:
        """Its body, for the time of an ``async with`` block.

        Raises:
            RefusedError: 413 for too large a body, 415 for a compressed one, 429 where there is no
                room for it among the others.
            ClientDisconnect: when the client goes meanwhile.
        """
        return Reading(request, self._most, self._held)

    async def rows(self, content_type: str, body: bytes) -> list[Any]:
        """The rows of a body, not yet checked against the schema's types.

        Args:
            content_type: the header; none is taken for JSON.

        Raises:
            RefusedError: 413, 415 or 422.
            RowsError: where a row and field can be named.
        """
        schema, most = self._schema, self._limits.rows
        kind = content_type.partition(";")[0].strip().lower() or JSON
        taken = types_for(schema)
        if kind not in taken:
            raise RefusedError(
                415, f"Content-Type must be one of {', '.join(taken)}, but got {kind[:80]!r}"
            )
        if kind == JSON:
            rows = await self._aside(_from_json, body, most, self._unpacked)
        elif kind == CSV:
            rows = await self._aside(tables.from_csv, body, most)
        elif kind in IMAGES:
            rows = await self._aside(_from_image, body, self._unpacked)
        else:
            read = tables.from_parquet if kind == PARQUET else tables.from_arrow
            rows = await self._sandbox.run(read, schema, body, most, self._unpacked)
        if not rows:
            raise RefusedError(422, "the body must hold at least one row, but holds none")
        return rows

    async def _aside(self, read: Callable[..., list[Any]], body: bytes, *limits: int) -> list[Any]:
        if not self._any_size:
            return await aside(len(body), read, self._schema, body, *limits)
        async with self._one:
            return await asyncio.to_thread(read, self._schema, body, *limits)

    def close(self) -> None:
        """End what was started for bodies."""
        self._sandbox.close()


class Reading:
    """Of one body, see `Bodies.read`.

    Args:
        most: bytes that it may have.
        held: bytes of all bodies at a time; to be changed.
    """

    def __init__(self, request: Request, most: int, held: list[int]) -> None:
        self._request = request
        self._most = most
        self._held = held
        self._own = 0

    async def __aenter__(self) -> bytes:
        try:
            return await self._body()
        except BaseException:
            self._held[0] -= self._own
            raise

    async def __aexit__(self, *_: object) -> None:
        self._held[0] -= self._own

    async def _body(self) -> bytes:
        limit = f"a body has at most {self._most} bytes"
        headers = self._request.headers
        coding = headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            text = f"a body must come uncompressed, but got Content-Encoding {coding[:80]!r}"
            raise RefusedError(415, text)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._most):
            raise RefusedError(413, f"{limit}, but this has {declared[:20]}: send fewer rows")
        exchange = exchange_of(self._request.scope)
        exchange.reading = True
        parts: list[bytes] = []
        more = True
        while more:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self._own += len(chunk)
            self._held[0] += len(chunk)
            if self._own > self._most:
                raise RefusedError(413, f"{limit}: send fewer rows")
            if self._held[0] > WAITING_BODIES * self._most:
                raise RefusedError(
                    429, "too many bodies at a time: come later", retry_after_s=OVERLOADED_S
                )
            parts.append(chunk)
        exchange.reading = False
        return b"".join(parts)


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """What it gives, for a request whose body is read; cancelled when its client goes.

    Raises:
        ClientDisconnect: when the client went.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, watching = asyncio.create_task(answer), asyncio.create_task(watch())
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        watching.cancel()


async def aside(size: int, function: Callable[..., T], *args: Any) -> T:
    """What the function returns: in a thread where it takes long, so that others are answered."""
    return await asyncio.to_thread(function, *args) if size > SMALL else function(*args)


def _from_json(schema: Schema, body: bytes, max_rows: int, max_bytes: int) -> list[Any]:
    value = _parsed(body)
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows or set(value) != {"rows"}:
        raise RefusedError(422, f"{FORM}{_but(value)}")
    if len(rows) > max_rows:
        raise tables.too_many_rows(max_rows)
    return decoded(schema, rows, max_bytes)


def _but(value: Any) -> str:
    """What is wrong with it, where that can be told."""
    if not isinstance(value, dict):
        return f", but is a {type(value).__name__}"
    if others := sorted(value.keys() - {"rows"}):
        return f" and nothing else, but has {', '.join(map(repr, others[:5]))[:80]}"
    return ""


def _parsed(body: bytes) -> Any:
    """
    Raises:
        RefusedError: 422 when it is no JSON.
    """
    try:
        return orjson.loads(body)  # a tenth of the time of the standard library's
    except ValueError:
        pass
    try:  # which takes more, and says better what is wrong
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(422, f"the body must be JSON: {error}") from None


def decoded(schema: Schema, rows: list[Any], most: float = math.inf) -> list[Any]:
    """The same with images that are files, as they are or in base64, as pixels.

    Raises:
        RefusedError: 413 when they unpack to more than ``most`` bytes.
        RowsError: naming the row.
    """
    columns = [c for c in schema.columns if c.kind == "image"]
    room = most
    for position, row in enumerate(rows):
        for column in columns:
            file = row.get(column.name) if isinstance(row, dict) else None
            if not isinstance(file, str | bytes):
                continue
            try:
                content = images.from_base64(column, file) if isinstance(file, str) else file
                room -= images.unpacked_bytes(column, content)
                if room < 0:
                    raise tables.too_large(int(most))
                row[column.name] = images.decode(column, content)
            except ImageError as error:
                problem = Problem(position, column.name, error.rule, error.value)
                raise RowsError([problem]) from None
    return rows


def _from_image(schema: Schema, body: bytes, max_bytes: int) -> list[Any]:
    (column,) = (c for c in schema.columns if c.kind == "image")
    return decoded(schema, [{column.name: body}], max_bytes)
