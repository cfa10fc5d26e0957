"""Every exception of lepton_ray.

LeptonRayError
├── InputError             the person's input is wrong: nothing was started (exit code 2)
│   ├── ExperimentError    the experiment file or a ``--set``; lists every problem with its line
│   ├── DataError          the data cannot be used as the experiment says
│   ├── ClusterError       the Ray cluster has less than the experiment asks for
│   ├── StoreError         the MLflow store or the results folder cannot be used
│   ├── ModelError         no such model, version or alias; or one this version cannot read
│   └── ServingError       the endpoint cannot be started as asked (its port is taken)
└── RunError               the input was right, the run failed (exit code 1)
    ├── TrainingError      the training function raised; carries its traceback
    ├── CheckpointError    a checkpoint cannot be read or written
    ├── DivergenceError    replicas, or a run and its verification, hold different bytes
    ├── StudyError         no trial of the study finished
    ├── GateError          the version missed its gate and was not promoted
    └── EndpointError      the endpoint answered wrongly or not at all
        ├── RefusedRequestError  it refuses the request; `status` says as what
        └── UnavailableError     it is busy, or cannot be reached, for longer than all tries

Messages say the rule, the value got, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeptonRayError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class InputError(LeptonRayError):
    """The person's input is wrong; nothing was started and nothing was lost."""

    exit_code = 2


class ExperimentError(InputError):
    """One or more problems of an experiment, all reported at once."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__(source, problems)

    def __str__(self) -> str:
        return "\n".join([f"{self.source}:", *(f"  {p}" for p in self.problems)])


class DataError(InputError):
    """The data cannot be used as the experiment says."""


class ClusterError(InputError):
    """The Ray cluster has less than the experiment asks for."""


class StoreError(InputError):
    """The MLflow store or the results folder cannot be used."""


class ModelError(InputError):
    """No such model, version or alias; or one that this version cannot read."""


class ServingError(InputError):
    """The endpoint cannot be started as asked."""


class RunError(LeptonRayError):
    """The input was right, the run failed."""


class TrainingError(RunError):
    """The training function raised."""


class CheckpointError(RunError):
    """A checkpoint cannot be read or written."""


class DivergenceError(RunError):
    """Two computations that must give the same bytes did not."""


class StudyError(RunError):
    """No trial of the study finished."""


class GateError(RunError):
    """The version missed its gate and was not promoted."""


class EndpointError(RunError):
    """The endpoint answered wrongly or not at all."""


class RefusedRequestError(EndpointError):
    """The endpoint refuses the request, and would again.

    Attributes:
        status: of HTTP.
        request_id: under which the endpoint's log has it.
    """

    def __init__(self, text: str, *, status: int, request_id: str = "") -> None:
        self.status = status
        self.request_id = request_id
        super().__init__(text)


class UnavailableError(EndpointError):
    """The endpoint is busy, or cannot be reached, for longer than all tries."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"
