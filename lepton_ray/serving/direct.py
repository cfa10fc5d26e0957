"""The short way to one route: what nearly all requests ask for does not go through a framework.

Of the time that a replica with a small model spends on a request, a third is the framework's:
middleware, routing, dependencies. So the request that carries most of the load is recognized here;
every other one, and one with a query, goes to the application.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lepton_ray.serving.refusals import RefusedError, answer, route_path
from lepton_ray.serving.requests import RowsError


class Direct:
    """
    Args:
        app: the application, which has the route too.
        route: its path takes no parameters.
        respond: what the route does with a request that has no query.
    """

    def __init__(
        self, app: ASGIApp, route: Route, respond: Callable[[Request], Awaitable[Response]]
    ) -> None:
        self._app = app
        self._route = route
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_asked(scope):
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        try:
            response = await self._respond(Request(scope, receive, send))
        except (RefusedError, RowsError) as error:
            response = answer(scope, error)
        await response(scope, receive, send)

    def _is_asked(self, scope: Scope) -> bool:
        return (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and not scope["query_string"]
            and route_path(scope) == self._route.path
        )
