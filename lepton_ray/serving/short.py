"""The short way into a replica: past what Ray Serve does with each request.

Of the time that a replica with a small model spends on a request, Serve takes a third: tasks that
watch for a client who goes, contexts, counts. Its HTTP server, in a replica that HAProxy reaches
directly, takes middleware that a function in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
(`jobs.proxy`). So requests for predictions and explanations go from there to the application, which
has its own queue, counts and log (`guard.Guard`). All others go through Serve, and so do these
where it must know of them:

- where it scales replicas by the requests in each (see `app.Endpoint`);
- while answers take long enough for clients to go before: it drops the requests of those.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:  # Serve's proxies load this module, and need nothing of a replica's
    from lepton_ray.serving.guard import Guard

PATHS = re.compile(r"/predict|/explain|/v2/models/[^/]+(/versions/[^/]+)?/infer")
SLOW_S = 1.0  # an answer, after which clients may have gone before theirs
TAKEN = "lepton_ray.short"  # in the scope of a request that came this way


@dataclass(frozen=True)
class _Offered:
    app: Guard
    loop: asyncio.AbstractEventLoop


_offered: _Offered | None = None  # of this process, if it is such a replica


def offer(app: Guard) -> None:
    """Let requests come to the application directly. Needs its running event loop."""
    global _offered
    _offered = _Offered(app, asyncio.get_running_loop())


def middleware() -> list[Middleware]:
    """For Serve, in every process of it that has an HTTP server."""
    return [Middleware(Short)]


class Short:
    """Stands before Serve in its HTTP server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        there = _offered
        if (
            there is not None
            and scope["type"] == "http"
            and PATHS.fullmatch(scope["path"])
            and there.app.took_s < SLOW_S
            and asyncio.get_running_loop() is there.loop  # a person may have given it a thread
        ):
            scope[TAKEN] = True
            await there.app(scope, receive, send)
        else:
            await self._app(scope, receive, send)
