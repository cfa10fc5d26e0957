"""The short way to some routes: what nearly all requests ask for does not go through a framework.

Of the time that a replica with a small model spends on a request, a third is the framework's:
middleware, routing, dependencies. So the requests that carry most of the load are recognized here;
every other one, and one with a query, goes to the application.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lepton_ray.serving.refusals import RefusedError, answer, route_path
from lepton_ray.serving.requests import RowsError


class Direct:
    """
    Args:
        app: the application, which has the routes too.
        responses: what those of its routes that are posted to do with a request that has no query,
            by path; none that takes parameters.
    """

    def __init__(
        self,
        app: Starlette,
        responses: Mapping[str, Callable[[Request], Awaitable[Response]]],
    ) -> None:
        self._app = app
        self._ways = {
            route.path: (route, responses[route.path])
            for route in app.routes
            if isinstance(route, Route) and route.path in responses
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        way = self._way(scope)
        if way is None:
            await self._app(scope, receive, send)
            return
        scope["route"], respond = way
        try:
            response = await respond(Request(scope, receive, send))
        except (RefusedError, RowsError) as error:
            response = answer(scope, error)
        await response(scope, receive, send)

    def _way(self, scope: Scope) -> tuple[Route, Callable[[Request], Awaitable[Response]]] | None:
        if scope["type"] == "http" and scope["method"] == "POST" and not scope["query_string"]:
            return self._ways.get(route_path(scope))
        return None
