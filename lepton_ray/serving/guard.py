"""What stands before every route: keys, the queue, the time limit, metrics and the access log.

A middleware of plain ASGI, so that it sees a request before a byte of its body is read, whichever
way the request came: through Serve's proxy or straight to a replica's port.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lepton_ray.config.schema import Limits
from lepton_ray.serving import short
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.metrics import Metrics
from lepton_ray.serving.refusals import RefusedError, answer, route_path

logger = logging.getLogger("ray.serve")  # into the replica's log, which Serve keeps and rotates

# A load balancer has no key; nor has a browser, whose page (which says nothing) asks for one.
OPEN = ("/", "/v2/health/live", "/v2/health/ready")
OVERLOADED_S = 1.0  # after which a client that was sent away may come again
# A caller who comes again at once, whatever is said, takes the time of an answer each time: the
# refusal comes late, and to wait costs nothing.
HELD_S = 1.0
HELD = 1000  # callers who are kept waiting for a refusal at a time
GONE = 499  # the client went before its answer, and it was noticed; seen in the log only
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY = "lepton_ray.exchange"


@dataclass
class Exchange:
    """One request and its answer; routes fill in what only they know."""

    id: str
    key: str = ""
    rows: int = 0
    """That were predicted; an explanation's are not counted."""
    version: int = 0
    reading: bool = False
    """The body is being read: what takes long is the client."""
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def exchange_of(scope: Scope) -> Exchange:
    """Of the request that a route answers."""
    found: Exchange = scope[_KEY]
    return found


def unexpected(exchange: Exchange) -> RefusedError:
    """A bug: where to find it, and nothing of what it is."""
    return RefusedError(500, f"unexpected error, in the log as request {exchange.id}")


def needs_keys(host: str, keys_file: str | None) -> bool:
    """Whether requests must bring a key: always, unless only this machine can send any."""
    if keys_file is not None:
        return True
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def scope_for(path: str) -> str | None:
    """The scope that a route asks of a key; None where it asks for none."""
    if path in OPEN:
        return None
    return {"/metrics": "admin", "/explain": "explain"}.get(path, "predict")


class Guard:
    """
    Args:
        keyring: the keys that are accepted; None where none are needed.
        log: takes one line of the access log: a flat mapping, without anything of a body.
        echo: answer with ``X-Request-ID``; not where Serve already does.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        keyring: Keyring | None,
        metrics: Metrics,
        log: Callable[[dict[str, Any]], None],
        echo: bool,
    ) -> None:
        self._app = app
        self._limits = limits
        self._keyring = keyring
        self._metrics = metrics
        self._log = log
        self._echo = echo
        self.inside = 0  # requests, but for those that only wait to be refused
        self._held = 0
        self.took_s = 0.0  # the last prediction

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        exchange = Exchange(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        scope[_KEY] = exchange

        async def receive_counted() -> Message:
            message = await receive()
            exchange.bytes_in += len(message.get("body", b""))
            return message

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                if self._echo or scope.get(short.TAKEN):
                    MutableHeaders(scope=message)["x-request-id"] = exchange.id
            exchange.bytes_out += len(message.get("body", b""))
            await send(message)

        self.inside += 1
        self._metrics.in_flight.inc()
        try:
            await self._answer(scope, headers, receive_counted, send_noted)
        except asyncio.CancelledError:  # by Serve, when the client goes
            exchange.status = exchange.status or GONE
            raise
        finally:
            self.inside -= 1
            self._metrics.in_flight.dec()
            self._note(scope, exchange, time.perf_counter() - start)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        try:
            self._admit(route_path(scope), headers, exchange)
            async with asyncio.timeout(self._limits.timeout_s):
                await self._app(scope, receive, send)
            return
        except RefusedError as error:
            refused = error
            if error.status == 429:
                await self._hold()
        except TimeoutError:
            within = f"within {self._limits.timeout_s:g} s"
            refused = (
                RefusedError(408, f"the body must arrive {within}: send it faster, or less of it")
                if exchange.reading
                else RefusedError(
                    503, f"no answer {within}: send fewer rows", retry_after_s=OVERLOADED_S
                )
            )
        except ClientDisconnect:
            exchange.status = GONE  # nobody is there to be answered
            return
        except Exception:
            # The trace is for the log; a client is told nothing of what is inside.
            logger.exception("request %s failed", exchange.id)
            refused = unexpected(exchange)
        if not exchange.status:
            await answer(scope, refused)(scope, receive, send)

    def _admit(self, path: str, headers: Headers, exchange: Exchange) -> None:
        """
        Raises:
            RefusedError: 401, 403 or 429.
        """
        needed = scope_for(path)
        if needed is None:
            return
        if self._keyring is not None:
            given = headers.get("authorization", "")
            exchange.key = self._keyring.admit(given, needed, time.monotonic()).id
        if self.inside > self._limits.queue:
            raise RefusedError(
                429,
                f"a replica takes {self._limits.queue} requests at a time: come again later",
                retry_after_s=OVERLOADED_S,
            )

    async def _hold(self) -> None:
        """Keep a caller waiting who comes too often, or finds no room."""
        if self._held >= HELD:
            return
        self.inside -= 1
        self._held += 1
        try:
            await asyncio.sleep(HELD_S)
        finally:
            self._held -= 1
            self.inside += 1

    def _note(self, scope: Scope, exchange: Exchange, seconds: float) -> None:
        if exchange.rows:  # else it says nothing of how long the next prediction takes
            self.took_s = seconds
        # The route's pattern and not the path: a path is free text, and would be a label each.
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.answered(
            route=route,
            status=exchange.status,
            seconds=seconds,
            rows=exchange.rows,
            version=exchange.version,
        )
        client = scope.get("client")
        self._log(
            {
                "id": exchange.id,
                "method": scope["method"],
                "route": route,
                "status": exchange.status,
                "ms": round(seconds * 1000, 3),
                "rows": exchange.rows,
                "version": exchange.version,
                "key": exchange.key,
                "client": client[0] if client else "",
                "bytes_in": exchange.bytes_in,
                "bytes_out": exchange.bytes_out,
            }
        )
