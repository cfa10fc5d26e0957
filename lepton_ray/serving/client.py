"""Ask an endpoint from Python: ``lepton_ray.Client(url).predict(rows)``."""

from __future__ import annotations

import base64
import datetime
import email.utils
import json
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx

from lepton_ray.errors import EndpointError, InputError, RefusedRequestError, UnavailableError
from lepton_ray.serving.given import as_rows

if TYPE_CHECKING:
    from lepton_ray.serving.given import Rows

FIRST_WAIT_S = 0.2  # before the second try; twice as long before each further one
LONGEST_WAIT_S = 20.0
BUSY = (429, 502, 503, 504)  # 502 and 504: a proxy lost the replica that it had asked


class Client:
    """One endpoint. Threads may share it; close it, or use it as a context manager.

    Args:
        url: of the endpoint, and none of its routes: ``http://127.0.0.1:8000``.
        key: what ``lepton-ray keys create`` printed, where the endpoint needs one.
        timeout_s: of one try.
        tries: at most, when the endpoint is busy (429, 503), lost a replica (502, 504) or
            cannot be reached.
        transport: of httpx, in place of the network.

    Raises:
        InputError: for a URL without http:// or https://.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        tries: int = 6,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"a URL begins with http:// or https://, but got {url!r}")
        self.url = url.rstrip("/")
        self._tries = tries
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout_s, transport=transport
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def predict(
        self,
        rows: Rows,
        *,
        top_k: int | None = None,
    ) -> dict[str, Any]:
        """The answer to each row, in order.

        Args:
            rows: see `given.as_rows`; an image may also be the bytes of a file.
            top_k: only the likeliest classes; default all.

        Returns:
            ``model``, ``version`` and ``predictions``: for each row ``label`` (or a list of
            ``labels``) and ``probabilities``, or ``value``.

        Raises:
            InputError: for what are no rows.
            RefusedRequestError: for what another try would not change; names the rule.
            UnavailableError: when the endpoint is busy or away for longer than all tries.
        """
        return self._post("/predict", rows, {} if top_k is None else {"top_k": top_k})

    def explain(
        self,
        rows: Rows,
        *,
        method: str | None = None,
        target: str | None = None,
    ) -> dict[str, Any]:
        """Why each row is answered so; see docs/explain.md.

        Args:
            rows: at most 8, as for `predict`.
            method: default integrated gradients where possible, else Kernel SHAP.
            target: a class; default the likeliest of each row.

        Raises:
            InputError, RefusedRequestError, UnavailableError: see `predict`.
        """
        query = {k: v for k, v in (("method", method), ("target", target)) if v is not None}
        return self._post("/explain", rows, query)

    def health(self) -> dict[str, Any]:
        """``status``, ``model`` and ``version``; ``problem`` when it cannot follow its alias.

        Raises:
            RefusedRequestError, UnavailableError: see `predict`.
        """
        answer: dict[str, Any] = self._ask(lambda: self._http.get("/health"))
        return answer

    def _post(self, path: str, rows: Any, query: dict[str, Any]) -> dict[str, Any]:
        sent = json.dumps({"rows": as_rows(rows, self._columns)}, default=_plain)
        headers = {"content-type": "application/json"}
        answer: dict[str, Any] = self._ask(
            lambda: self._http.post(path, content=sent, params=query, headers=headers)
        )
        return answer

    def _columns(self) -> list[str]:
        return [tensor["name"] for tensor in self._model()["inputs"]]

    def _model(self) -> dict[str, Any]:
        name = self.health()["model"]
        model: dict[str, Any] = self._ask(lambda: self._http.get(f"/v2/models/{name}"))
        return model

    def _ask(self, send: Callable[[], httpx.Response]) -> Any:
        """One answer. Each request may be sent twice: to predict changes nothing."""
        for attempt in range(1, self._tries + 1):
            try:
                response = send()
            except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout) as error:
                reason, asked = f"does not answer: {error or type(error).__name__}", 0.0
            except httpx.HTTPError as error:
                raise UnavailableError(f"{self.url}: {error or type(error).__name__}") from error
            else:
                if response.status_code == 200:
                    return _json(self.url, response)
                reason, asked = _said(response), _retry_after_s(response)
                if response.status_code not in BUSY:
                    raise RefusedRequestError(
                        f"{self.url} {reason}",
                        status=response.status_code,
                        request_id=response.headers.get("x-request-id", ""),
                    )
            if attempt == self._tries or asked > LONGEST_WAIT_S:
                break
            time.sleep(wait_s(attempt, asked, random.random()))
        raise UnavailableError(f"{self.url} {reason}; tried {attempt} times")


def wait_s(attempt: int, asked_s: float, chance: float) -> float:
    """Seconds before the next try: what the endpoint asked for, and a random part of a time that
    doubles, so that clients sent away together do not come back together.

    Args:
        attempt: that failed, from 1.
        chance: in [0, 1).
    """
    return asked_s + chance * float(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds, or a date (RFC 9110, 10.2.3); 0 for none, or neither."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _said(response: httpx.Response) -> str:
    return f"answers {response.status_code}: {response.text[:500]}"


def _json(url: str, response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise EndpointError(f"{url} {_said(response)}, which is no JSON") from None


def _plain(value: Any) -> Any:
    """What JSON has not: NumPy's numbers and arrays as Python's, dates as texts, files in base64,
    pandas' gaps as none."""
    if repr(value) in ("NaT", "<NA>"):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date):  # pandas' timestamps are that too
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    text = "a value must be a number, a text, a date, a file or an array"
    raise TypeError(f"{text}, but got {type(value).__name__}")
