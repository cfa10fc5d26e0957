"""The routes of an endpoint: an ASGI application that knows neither Ray nor Serve.

``/predict`` for rows, ``/v2`` for the Open Inference Protocol; both end in `_Routes.infer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.responses import Response as HttpResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from lepton_ray import __version__
from lepton_ray.config.schema import Limits
from lepton_ray.errors import InputError, nearest
from lepton_ray.serving import answers, bodies, metrics, openapi, tables, tensors
from lepton_ray.serving.bodies import Bodies
from lepton_ray.serving.direct import Direct
from lepton_ray.serving.explain.answers import (
    METHODS,
    ExplainResponse,
    check,
    explains,
)
from lepton_ray.serving.guard import Guard, exchange_of, unexpected
from lepton_ray.serving.keys import Keyring
from lepton_ray.serving.metrics import Metrics, Snapshot
from lepton_ray.serving.page import model as page_model
from lepton_ray.serving.page import page
from lepton_ray.serving.refusals import RefusedError, answer
from lepton_ray.serving.requests import Columns, RowsError, columns_of
from lepton_ray.serving.runtime import Floats, Runtime

EXPLAINED_ROWS = 8  # of one request: each costs as much as hundreds of predictions
HEADER_LENGTH = "inference-header-content-length"


class Predictor(Protocol):
    """What answers: a replica of an endpoint."""

    @property
    def answering(self) -> tuple[Runtime, ...]:
        """The versions that answer now, the champion first."""

    @property
    def sticky(self) -> str:
        """Header by which a caller stays with one version, or ""."""

    @property
    def problem(self) -> str:
        """What keeps it from following its alias, or ""."""

    @property
    def state(self) -> dict[str, Any]:
        """Of what is tried beside the champion."""

    async def infer(
        self, columns: Columns, caller: str, version: str | None = None
    ) -> tuple[Runtime, Floats]:
        """The version that answered, and [n, classes] probabilities or [n, 1] values.

        Args:
            caller: whoever is the same gets the same version.
            version: the only one that may answer, where one was asked for.
        """

    async def explain(
        self, runtime: Runtime, columns: Columns, method: str | None, target: str | None
    ) -> str:
        """Why a version, one of those that answer, answers each row so.

        Returns:
            See `explain.answers.to_json`.

        Raises:
            InputError: for a method or class that it has not.
            RefusedError: 429 when too many are waiting.
        """

    async def totals(self) -> Snapshot:
        """What all replicas have counted."""


def build(
    predictor: Predictor,
    *,
    limits: Limits,
    keyring: Keyring | None,
    counts: Metrics,
    log: Callable[[dict[str, Any]], None],
    echo: bool,
    explain: bool,
) -> Guard:
    """The application: the guard, then the short way to two routes, then all of them.

    Args:
        keyring, log, echo: see `guard.Guard`.
        explain: whether it also says why.
    """
    champion = predictor.answering[0]
    schema, name = champion.schema, champion.name
    explain = explain and explains(schema)
    routes = _Routes(predictor, limits, keys=keyring is not None, explain=explain)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        routes.bodies.close()

    # Its pages of routes need no internet, as FastAPI's own do.
    api = FastAPIOffline(
        title=name, version=__version__, description="Served by lepton_ray.", lifespan=lifespan
    )
    for error in (RefusedError, RowsError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(error, _refuse)
    keyed = keyring is not None
    secure = [Depends(HTTPBearer(auto_error=False, description="A key."))] if keyed else []
    strict = [*secure, Depends(_known_parameters)]
    refusals = partial(openapi.refusals, keys=keyed)
    asked = refusals(body=True)
    api.post(
        "/predict",
        response_model=answers.form_of(schema).response,
        responses=asked,
        openapi_extra=openapi.rows(schema),
        dependencies=strict,
    )(routes.predict)
    if explain:
        api.post(
            "/explain",
            response_model=ExplainResponse,
            response_model_exclude_none=True,
            responses=asked,
            openapi_extra=openapi.rows(schema),
            dependencies=strict,
        )(routes.explain)
    api.get("/", include_in_schema=False)(routes.page)
    api.get("/page.json", include_in_schema=False)(routes.page_model)
    api.get("/health", responses=refusals(), dependencies=secure)(routes.health)
    counts_page: openapi.Responses = {200: {"content": {metrics.CONTENT_TYPE: {}}}}
    api.get(
        "/metrics",
        response_class=HttpResponse,
        responses=counts_page | refusals(),
        dependencies=secure,
    )(routes.metrics)
    named = refusals(v2=True, named=True)
    inferred = openapi.inferred() | refusals(v2=True, named=True, body=True)
    api.get("/v2", responses=refusals(v2=True), dependencies=secure)(routes.server)
    api.get("/v2/health/live")(routes.live)
    api.get("/v2/health/ready")(routes.ready)
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        api.get(path, responses=named, dependencies=secure)(routes.model)
        api.get(f"{path}/ready", responses=named, dependencies=secure)(routes.model_ready)
        api.post(
            f"{path}/infer",
            responses=inferred,
            openapi_extra=openapi.inference(),
            dependencies=secure,
        )(routes.v2_infer)
    direct = Direct(api, {"/predict": routes.predict, "/explain": routes.explain})
    return Guard(direct, limits=limits, keyring=keyring, metrics=counts, log=log, echo=echo)


class _Routes:
    def __init__(self, predictor: Predictor, limits: Limits, *, keys: bool, explain: bool) -> None:
        self._predictor = predictor
        self._keys = keys
        self._explain = explain
        self._limits = limits
        # Each version that is followed has the same columns.
        self._schema = predictor.answering[0].schema
        self._form = answers.form_of(self._schema)
        self.bodies = Bodies(self._schema, limits)

    async def _infer(
        self,
        request: Request,
        rows: list[Any],
        *,
        version: str | None = None,
        top_k: int | None = None,
    ) -> tuple[Runtime, Floats, list[Any]]:
        """The one way from rows to answers."""
        columns = await bodies.aside(len(rows) * bodies.ROW, columns_of, self._schema, rows)
        exchange = exchange_of(request.scope)
        sticky = self._predictor.sticky
        caller = (sticky and request.headers.get(sticky)) or exchange.id
        runtime, found = await self._predictor.infer(columns, caller, version)
        given = await bodies.aside(len(rows) * bodies.ROW, runtime.answers, found, top_k)
        exchange.rows, exchange.version = len(rows), runtime.version
        return runtime, found, given

    async def predict(
        self,
        request: Request,
        top_k: Annotated[int | None, Query(ge=1, description="So many classes or items.")] = None,
    ) -> Any:
        """The answer to each row: class probabilities, the best items, or values."""
        if top_k is not None and not self._form.top_k:
            text = "top_k is for classes, or items of a ranking, but this model answers numbers"
            raise RefusedError(422, f"{text}: {top_k}")
        async with self.bodies.read(request) as body:
            rows = await self.bodies.rows(request.headers.get("content-type", ""), body)
            runtime, _, given = await self._infer(request, rows, top_k=top_k)
        # Not as an object: FastAPI would check and copy what is known to be right.
        said = self._form.response.model_construct(
            model=runtime.name, version=runtime.version, predictions=given
        )
        return HttpResponse(said.model_dump_json(), media_type=bodies.JSON)

    async def explain(
        self,
        request: Request,
        method: Annotated[str | None, Query(description=", ".join(METHODS))] = None,
        target: Annotated[str | None, Query(description="A class; default the likeliest.")] = None,
        version: Annotated[str | None, Query(description="Default the champion.")] = None,
    ) -> Any:
        """Why each row is answered so: weights of columns, words or pixels."""
        async with self.bodies.read(request) as body:
            rows = await self.bodies.rows(request.headers.get("content-type", ""), body)
            if len(rows) > EXPLAINED_ROWS:
                text = f"at most {EXPLAINED_ROWS} rows are explained at a time: send fewer"
                raise RefusedError(413, text)
            columns = await bodies.aside(len(rows) * bodies.ROW, columns_of, self._schema, rows)
        try:
            runtime = self._served(self._predictor.answering[0].name, version)
            check(runtime.schema, method, target)
            explaining = self._predictor.explain(runtime, columns, method, target)
            said = await bodies.unless_gone(request, explaining)
        except RowsError:
            raise
        except InputError as error:
            raise RefusedError(422, str(error)) from None
        exchange = exchange_of(request.scope)
        exchange.version = runtime.version
        return HttpResponse(said, media_type=bodies.JSON)

    async def page(self) -> HttpResponse:
        """For a person in a browser; of models whose rows no form is for, the pages of routes."""
        if not explains(self._schema):
            return RedirectResponse("/docs")
        content, headers = page(
            self._predictor.answering[0], keys=self._keys, explain=self._explain
        )
        return HTMLResponse(content, headers=headers)

    async def page_model(self) -> dict[str, Any]:
        """What the page shows, where it takes a key to see it."""
        return page_model(self._predictor.answering[0], explain=self._explain)

    async def health(self) -> dict[str, Any]:
        """Which version answers, what is tried beside it, and what keeps it from following."""
        runtime, problem = self._predictor.answering[0], self._predictor.problem
        said = {"problem": problem} if problem else {}
        return {
            "status": "ok",
            "model": runtime.name,
            "version": runtime.version,
            **self._predictor.state,
            **said,
        }

    async def metrics(self) -> HttpResponse:
        """What all replicas have counted, for Prometheus."""
        page = metrics.page(await self._predictor.totals())
        return HttpResponse(page, media_type=metrics.CONTENT_TYPE)

    async def server(self) -> dict[str, Any]:
        """What this server is, and which extensions of the protocol it has."""
        return {
            "name": "lepton_ray",
            "version": __version__,
            "extensions": ["binary_tensor_data"],
        }

    async def live(self) -> dict[str, bool]:
        """It answers."""
        return {"live": True}

    async def ready(self) -> dict[str, bool]:
        """A replica has its model before it gets a request."""
        return {"ready": True}

    async def model(self, model: str, version: str | None = None) -> dict[str, Any]:
        """The tensors that the model takes and answers with."""
        runtime = self._served(model, version)
        return {
            "name": runtime.name,
            "versions": [str(answering.version) for answering in self._predictor.answering],
            "platform": "onnx_onnxv1",
            "inputs": tensors.inputs_of(runtime.schema),
            "outputs": tensors.outputs_of(runtime.schema),
        }

    async def model_ready(self, model: str, version: str | None = None) -> dict[str, Any]:
        """It answers with this model."""
        return {"name": self._served(model, version).name, "ready": True}

    async def v2_infer(
        self, request: Request, model: str, version: str | None = None
    ) -> HttpResponse:
        """The answer to each row of the tensors."""
        self._served(model, version)
        async with self.bodies.read(request) as body:
            asked = await bodies.aside(
                len(body), tensors.decode, body, request.headers.get(HEADER_LENGTH)
            )
            count = len(asked.inputs[0].values)
            if count > self._limits.rows:
                raise tables.too_many_rows(self._limits.rows)
            if count == 0:
                raise RefusedError(422, "inputs must have at least one row, but have none")
            rows = tensors.rows_of(self._schema, asked.inputs)
            runtime, found, answered = await self._infer(request, rows, version=version)
        if version is not None and version != str(
            runtime.version
        ):  # another one took over meanwhile
            raise _unknown(model, version, runtime)
        given = tensors.outputs(self._schema, found, answered)
        content, head = tensors.encode(asked, given, runtime.name, runtime.version)
        if head is None:
            return HttpResponse(content, media_type="application/json")
        return HttpResponse(
            content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(head)}
        )

    def _served(self, model: str, version: str | None) -> Runtime:
        """
        Raises:
            RefusedError: 404 for another model or version than those that answer.
        """
        answering = self._predictor.answering
        for runtime in answering:
            if model == runtime.name and version in (None, str(runtime.version)):
                return runtime
        raise _unknown(model, version, answering[0])


def _known_parameters(request: Request) -> None:
    """
    Raises:
        RefusedError: 422 for a parameter that the route has not, which would change nothing.
    """
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise RefusedError(422, f"no parameter {name[:80]!r}, {nearest(name[:80], known)}")


async def _refuse(request: Request, error: Exception) -> HttpResponse:
    """Every refusal in one form, those of FastAPI and Starlette too."""
    if isinstance(error, RequestValidationError):
        text = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}, but got {repr(e['input'])[:80]}"
            for e in error.errors()
        )
        error = RefusedError(422, text)
    elif isinstance(error, HTTPException):
        error = RefusedError(error.status_code, f"{error.detail}: see /docs for the routes")
    if not isinstance(error, RefusedError | RowsError):  # which the guard hears of, and logs
        error = unexpected(exchange_of(request.scope))
    return answer(request.scope, error)


def _unknown(model: str, version: str | None, runtime: Runtime) -> RefusedError:
    asked = model[:80] + (f" version {version[:80]}" if version else "")
    return RefusedError(
        404, f"no model {asked!r} here; served is {runtime.name!r} version {runtime.version}"
    )
