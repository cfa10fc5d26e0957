"""How a request is refused: one exception, and one place that puts it into words for a client."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Scope

from lepton_ray.serving.requests import RowsError

SHOWN_PROBLEMS = 20  # that one answer lists; a wrong body must not be answered by a larger one


class RefusedError(Exception):
    """A request is answered with an error; the text is for the client to read.

    Args:
        status: of HTTP, 4xx or 503.
        retry_after_s: when the client may come again, for 429 and 503.
    """

    def __init__(self, status: int, text: str, retry_after_s: float | None = None) -> None:
        self.status = status
        self.retry_after_s = retry_after_s
        super().__init__(status, text, retry_after_s)  # all of it, so that it can be pickled

    def __str__(self) -> str:
        return str(self.args[1])


def route_path(scope: Scope) -> str:
    """The path as the routes see it: without the prefix the application is mounted at.

    Starlette's rule to the letter: what `guard` lets through unasked is decided by this path, so it
    must never differ from the one a route is chosen by.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if not root or not path.startswith(root):
        return path
    rest = path[len(root) :]
    return rest if not rest or rest[0] == "/" else path


def answer(scope: Scope, error: RefusedError | RowsError) -> Response:
    """The response: ``{"error": text}`` under ``/v2``, as its protocol says, else ``{"detail":
    ...}``, where wrong rows are listed as objects of row, field, rule and value.
    """
    status = error.status if isinstance(error, RefusedError) else 422
    path = route_path(scope)
    if path == "/v2" or path.startswith("/v2/"):
        body: dict[str, Any] = {"error": _text(error)}
    elif isinstance(error, RowsError):
        body = {"detail": [vars(p) for p in error.problems[:SHOWN_PROBLEMS]]}
    else:
        body = {"detail": str(error)}
    # ASCII: a name in a request may hold half a surrogate pair, which UTF-8 cannot carry.
    response = Response(json.dumps(body), status, media_type="application/json")
    headers = MutableHeaders(raw=response.raw_headers)
    if isinstance(error, RefusedError) and error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="lepton_ray"'
    if status in (408, 413):  # the rest of the body is not read
        headers["connection"] = "close"
    return response


def _text(error: RefusedError | RowsError) -> str:
    if isinstance(error, RowsError):
        return "; ".join(map(str, error.problems[:SHOWN_PROBLEMS]))
    return str(error)
