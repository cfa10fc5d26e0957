"""What a version must be to be promoted, and how its endpoint answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lepton_ray.config.schema.section import Section

LARGEST_BATCH = 64  # that is chosen; rows cost about the same in larger ones


class Gate(Section):
    metric: str = "accuracy"
    at_least: float | None = None
    at_most: float | None = None
    beats: tuple[Literal["baseline", "linear", "boosting", "champion"], ...] = ("baseline",)
    """What the version must be better than on the test split: the trivial baseline, the linear
    one, gradient boosting (for tables), the current champion (if there is one)."""
    max_latency_ms: float | None = Field(None, gt=0)
    """Median milliseconds of the runtime to answer one row, on one thread of the machine that
    checks."""
    max_mb: float | None = Field(None, gt=0)
    """Megabytes of the model's file that is served."""
    max_difference: float | None = Field(None, gt=0)
    """Largest difference between the answers of torch and of the runtime that is served, as it was
    measured when the version was registered."""


class Rule(Section):
    """What ends a canary: at once when it is 97.5 % certain that a share is over its limit."""

    errors: float = Field(0.01, ge=0, le=1)
    """Share of its requests that it fails at and the champion does not."""
    p99_ratio: float = Field(2.0, gt=0)
    """Its p99 over the champion's."""
    disagreement: float = Field(0.2, ge=0, le=1)
    """Share of its rows to which the champion says something else: another label, or a number
    further away than ``tolerance``."""
    tolerance: float = Field(0.1, ge=0)
    """In deviations of the training targets."""
    drift: float | None = Field(None, gt=0)
    """How far a column of the requests may be from what it was trained on: the population stability
    index, of 500 rows at least. Left out, that ends no canary."""
    requests: int = Field(200, ge=1)
    """That it must have answered before it is promoted, and both before their p99 is compared."""


class Canary(Section):
    """How a new version is tried on a part of the traffic."""

    share: float = Field(0.1, gt=0, le=1)
    """Of callers."""
    minutes: float = Field(30.0, gt=0)
    """After which it is promoted, when no rule has ended it."""
    sticky: str = Field("x-session-id", pattern=r"^[A-Za-z0-9-]{1,64}$")
    """Header by whose value a caller stays with one version; without it each request is drawn."""
    rule: Rule = Rule()


class Replicas(Section):
    min: int = Field(1, ge=0)
    """At 0, the first request after a quiet time waits until a replica has started."""
    max: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _range(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min <= max must hold, but got {self.min} and {self.max}")
        return self


class Batching(Section):
    """``auto`` is chosen when a version is loaded, from measured forward passes."""

    max: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows in one forward pass at most."""
    wait_ms: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """How long a batch that is not full waits for more under load; a request that finds the model
    idle never waits."""
    p99_ms: float = Field(50.0, gt=0)
    """What the choice leaves time for."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {} if value == "auto" else value

    @property
    def largest(self) -> int:
        """What ``max`` can be."""
        return LARGEST_BATCH if self.max == "auto" else self.max


class Limits(Section):
    """What an endpoint takes; a request beyond is refused and named, never cut."""

    body_mb: float = Field(16.0, gt=0)
    """MiB of one request's body (413)."""
    decoded_mb: float = Field(256.0, gt=0)
    """MiB that the texts and images of a body unpack to (413)."""
    rows: int = Field(10_000, ge=1)
    """Rows of one request (413)."""
    queue: int = Field(256, ge=1)
    """Requests in a replica at a time, waiting or running (429)."""
    timeout_s: float = Field(60.0, gt=0)
    """For one request, from its head to its answer (408 while its body arrives, then 503)."""


class Serve(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    replicas: Replicas = Replicas()
    gpus: float = Field(0.0, ge=0)
    """Of each replica, a part of one or whole ones; its model runs there with torch. At 0 it runs
    on a CPU with ONNX Runtime."""
    batch: Batching = Batching()
    limits: Limits = Limits()
    canary: Canary | None = None
    """With it, ``run`` tries a version that passed its gate beside the champion, and does not
    promote it at once."""
    keys: str | None = None
    """File of API keys; with it every request needs one. Default: none on loopback, and
    ``lepton_keys.json`` at any other host."""
    explain: bool = True
    """Whether ``POST /explain`` answers; its replica is started by the first request."""
    examples: int = Field(8, ge=0, le=100)
    """Test samples that a version carries for its page; 0 for none, where they must not leave."""
