"""The seam to Ray Train's controller: what its public settings cannot express.

Ray Train reads its intervals from ``RAY_TRAIN_*`` variables, and copies those into every worker's
runtime environment, so that prestarted workers no longer fit and each start is a cold one. Here
they are set on the controller itself. This is the only file that knows private names of Ray Train;
``ray==2.60.*`` is pinned, and tests/ray checks the names.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController

POLL_S = 0.25  # Ray's 2 s would be paid at every start, end and failure


class Controller(TrainController):
    """Ray Train's controller with a shorter poll, and a mailbox for what replicas report.

    ``ray.train.report`` waits for all ranks and for the next poll; progress and metrics need
    neither, so replica 0 sends them here (`put`) and the driver takes them (`drain`).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._health_check_interval_s = POLL_S
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        """The events since the last call, in the order they were sent."""
        events, self._events = self._events, []
        return sorted(events, key=lambda event: event["at"])


class Trainer(TorchTrainer):
    """``TorchTrainer`` run by our `Controller`, which workers find by ``controller_name``."""

    def __init__(self, *args: Any, controller_name: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._controller_name = controller_name
        self._controller: Any = None

    def drain(self) -> list[dict[str, Any]]:
        """What replica 0 reported since the last call."""
        events: list[dict[str, Any]] = []
        if self._controller is not None:
            events = ray.get(self._controller.drain.remote())
        return events

    def _initialize_and_run_controller(self, **kwargs: Any) -> Result:
        node = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        options: dict[str, Any] = {
            "name": self._controller_name,
            "num_cpus": 0,
            "label_selector": node,
        }
        variables = get_env_vars_to_propagate()
        if variables:
            options["runtime_env"] = {"env_vars": variables}
        self._controller = ray.remote(**options)(Controller).remote(**kwargs)
        ray.get(self._controller.run.remote())
        result: Result = ray.get(self._controller.get_result.remote())
        return result
