"""What ended Ray Train's group, and whether it starts again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from lepton_ray.training import elasticity
from lepton_ray.training.crew import ReplicaError
from lepton_ray.training.elasticity import Failure

if TYPE_CHECKING:
    from lepton_ray.training.controller import Controller


class Failures(FailurePolicy):
    """Tells lost workers, which are replaced, from exceptions, which end the run."""

    def bind(self, controller: Controller) -> None:
        self._controller = controller
        self._earlier: list[Failure] = []

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if not isinstance(training_failed_error, WorkerGroupError):
            return FailureDecision.RETRY  # the group did not start: the next look finds less room
        failure = failure_of(training_failed_error, self._controller.last_step)
        verdict = elasticity.decide_failure(failure, self._earlier)
        self._earlier.append(failure)
        self._controller.tell(kind="failure", reason=verdict.reason, retry=verdict.retry)
        return FailureDecision.RETRY if verdict.retry else FailureDecision.RAISE


def failure_of(error: WorkerGroupError, last_step: int) -> Failure:
    """The cause among what all workers report: an own exception before a lost process."""
    raised = [r for r in map(replica_error, error.worker_failures.values()) if r is not None]
    step = max([last_step, *(r.step for r in raised)])
    own = [r for r in raised if not r.connection]
    if own:
        return Failure(step=own[0].step, exception=own[0].text, fatal=own[0].fatal)
    return Failure(step=step, exception="")


def replica_error(error: Exception) -> ReplicaError | None:
    """The replica's own error inside Ray's wrapping; None for a process that died."""
    base = (
        getattr(error, "_base_exc", error)
        if isinstance(error, UserExceptionWithTraceback)
        else error
    )
    if isinstance(base, ReplicaError):
        return base
    if isinstance(base, WorkerHealthCheckFailedError | RayActorError):
        return None
    return ReplicaError(0, str(error), connection=False, fatal=False)
