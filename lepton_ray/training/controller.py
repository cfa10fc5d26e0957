"""The seam to Ray Train's controller: what its public settings cannot express.

Ray Train reads its intervals from ``RAY_TRAIN_*`` variables, and copies those into every worker's
runtime environment, so that prestarted workers no longer fit and each start is a cold one; it sizes
a restart from a view up to 20 s old, looks for new nodes once a minute, and takes no checkpoint
before it kills the group. Here the intervals are set on the controller itself, sizes come from the
nodes as they are, and replica 0 saves and waits before a resize, so that no step is lost.

This and `failures` are the only files that know private names of Ray Train; ``ray==2.60.*`` is
pinned, and tests/ray fails when a name goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get
from ray.train import Result
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from lepton_ray.training import elasticity
from lepton_ray.training.crew import Crew
from lepton_ray.training.elasticity import NodeView
from lepton_ray.training.failures import Failures
from lepton_ray.training.membership.coordinator import Coordinator

POLL_S = 0.25  # Ray's 2 s would be paid at every start, end and failure
LOOK_S = 1.0  # between two looks at the nodes
EVENTS_S = 0.2  # between two looks for events
ABORT_TIMEOUT_S = 30.0  # for the group to end after Ctrl-C
START_TIMEOUT_S = 5.0  # for a placement group; room was counted just before, so it is there or gone
PAUSE_TIMEOUT_S = 30.0  # for replica 0 to save; after it the group is resized all the same

pause_requested = threading.Event()
"""Set in a worker's process when its group is about to be resized."""


def _request_pause() -> None:
    pause_requested.set()


class _Group(WorkerGroup):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._worker_group_start_timeout_s = START_TIMEOUT_S


class _WithGroup(_TorchBackend):
    def on_shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the processes end next, and replicas that wait for a lost one would hold up a
        tidy end for 30 s."""


class _NoGroup(ray.train.backend.Backend):
    """Live replicas form their own groups."""


@dataclass
class Backend(TorchConfig):
    """Ray Train's torch backend with a quick end, or none."""

    live: bool = False

    @property
    def backend_cls(self) -> Any:
        return _NoGroup if self.live else _WithGroup


class Scaling(ScalingPolicy):
    """Sizes the group from the nodes as they are now, and sees to the live replicas."""

    def after_controller_start(self, train_run_context: Any) -> None:
        if _has_dashboard():  # else a process is started to ask an autoscaler that is not there
            super().after_controller_start(train_run_context)

    def bind(self, controller: Controller) -> None:
        self._controller = controller
        self._looked_at = 0.0
        self._pausing_since: float | None = None
        self._planned: elasticity.Resize | None = None
        self.paused: set[int] = set()
        """Ranks of the group that wait at a step boundary; what they would lose is saved."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._ask_for_nodes()
        limits = self.scaling_config
        size = elasticity.decide_start(
            self._make_room(), self._each, minimum=limits.min_workers, maximum=limits.max_workers
        )
        return NoopDecision() if size is None else self._resize(size)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._ask_for_nodes()
        if self._planned is not None:
            assert self._pausing_since is not None
            waited = time.monotonic() - self._pausing_since
            size = worker_group_state.num_workers
            if len(self.paused) >= size or waited > PAUSE_TIMEOUT_S:
                self._make_room()
                return self._resize(self._planned.size)
            return NoopDecision()
        if time.monotonic() - self._looked_at < LOOK_S:
            return NoopDecision()
        self._looked_at = time.monotonic()
        nodes, live = self._nodes(), 0
        if self._controller.crew is not None:
            self._controller.crew.keep(nodes)
            live = self._controller.crew.staying(nodes)
        current = worker_group_state.num_workers
        limits = self.scaling_config
        self._planned = elasticity.decide_resize(
            nodes,
            self._each,
            current=current,
            minimum=limits.min_workers,
            maximum=limits.max_workers,
            live=live,
        )
        if self._planned is not None:
            self._pausing_since = time.monotonic()
            self.paused.clear()
            self._controller.tell(
                kind="resize", reason=self._planned.reason, before=current, after=self._planned.size
            )
            worker_group = self._controller.get_worker_group()
            assert worker_group is not None
            worker_group.execute_async(_request_pause)
        return NoopDecision()

    def _ask_for_nodes(self) -> None:
        if self._coordinator_client is not None:
            self._maybe_send_resource_request()  # type: ignore[no-untyped-call]

    def _resize(self, size: int) -> ResizeDecision:
        self._planned, self._pausing_since = None, None
        return ResizeDecision(num_workers=size, resources_per_worker=self._each)

    @property
    def _each(self) -> dict[str, float]:
        return dict(self.scaling_config._resources_per_worker_not_none)

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers)

    def _make_room(self) -> list[NodeView]:
        """The nodes, from which live replicas go that are in the group's way."""
        nodes = self._nodes()
        if self._controller.crew is not None:
            self._controller.crew.make_room(nodes, self.scaling_config.min_workers)
        return nodes

    def _nodes(self) -> list[NodeView]:
        group = self._controller.get_worker_group()
        workers = group.get_workers() if group and group.has_started() else []
        free = ray._private.state.available_resources_per_node()
        draining = ray._private.state.state.get_draining_nodes()
        crew = self._controller.crew
        apart = crew.labels if crew is not None else {}
        return [
            NodeView(
                id=node["NodeID"],
                free=free.get(node["NodeID"], {}),
                ours=sum(worker.metadata.node_id == node["NodeID"] for worker in workers),
                draining=node["NodeID"] in draining,
                for_group=not (apart and apart.items() <= node["Labels"].items()),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]


@dataclass(frozen=True, kw_only=True)
class LiveReplicas:
    """What a run with live replicas has beside Ray Train's group."""

    minimum: int
    """Workers of Ray Train's group."""
    size: int
    """Live replicas at most."""
    each: dict[str, float]
    """Resources of one."""
    labels: dict[str, str]
    """Of the nodes they run on, and Ray Train's group does not; none for all nodes."""
    work: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]


class Controller(TrainController):
    """Ray Train's controller with our policies, and a mailbox for what replicas report.

    ``ray.train.report`` waits for all ranks and for the next poll; progress and metrics need
    neither, so replica 0 sends them here (`put`) and the driver takes them (`drain`).
    """

    worker_group_cls = _Group

    def __init__(self, live: LiveReplicas | None, **kwargs: Any) -> None:
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.crew: Crew | None = None
        self._coordinator: Coordinator | None = None
        if live is not None:
            self._secret = secrets.token_bytes(32)
            self._coordinator = Coordinator(
                ray.util.get_node_ip_address(),
                self._secret,
                minimum=live.minimum,
                tell=self._events.put,
            )
            self.crew = Crew(
                live.size,
                live.each,
                live.labels,
                live.work,
                live.config,
                self._coordinator,
                self.tell,
            )
        self.last_step = 0
        self._scaling: Scaling = kwargs["scaling_policy"]
        self._scaling.bind(self)
        kwargs["failure_policy"].bind(self)
        super().__init__(**kwargs)
        self._health_check_interval_s = POLL_S
        # Ray's own watcher would hold every resize back until the drained node is gone.
        self._worker_group_callbacks_to_propagate = [
            callback
            for callback in self._worker_group_callbacks_to_propagate
            if not isinstance(callback, PreemptionCallback)
        ]

    def put(self, event: dict[str, Any]) -> None:
        self.last_step = max(self.last_step, event.get("step", 0))
        if event["kind"] == "start":
            self.last_step = event["step"]
        if event["kind"] == "paused" and event["rank"] is not None:  # of the group
            self._scaling.paused.add(event["rank"])
        self._events.put(event)

    def tell(self, **event: Any) -> None:
        """An event of the controller itself."""
        self._events.put({**event, "at": time.time()})

    def meeting_point(self) -> tuple[tuple[str, int, int], bytes]:
        """Where the replicas of a live membership meet, and the run's secret."""
        assert self._coordinator is not None
        return self._coordinator.address, self._secret

    async def run(self) -> None:
        try:
            await super().run()  # type: ignore[no-untyped-call]
        finally:
            if self.crew is not None and self._coordinator is not None:
                self.crew.stop()
                self._coordinator.close()

    async def _run_control_loop_iteration(self) -> None:
        before = self.get_state()
        await super()._run_control_loop_iteration()  # type: ignore[no-untyped-call]
        if self.get_state() is before:
            # No room for the group. Ray looks again at once, and in a loop that never waits
            # replicas and the driver are not heard.
            await asyncio.sleep(POLL_S)

    def drain(self) -> list[dict[str, Any]]:
        """The events since the last call, in the order they were sent."""
        events = [self._events.get() for _ in range(self._events.qsize())]
        return sorted(events, key=lambda event: event["at"])


def _has_dashboard() -> bool:
    """Whether others may look at this Ray, an autoscaler too: `jobs.session` starts its without."""
    found = _internal_kv_get(DASHBOARD_ADDRESS, namespace=KV_NAMESPACE_DASHBOARD)
    return found not in (None, elasticity.NO_DASHBOARD)


class Trainer(TorchTrainer):
    """``TorchTrainer`` run by our `Controller`, which workers find by ``controller_name``.

    ``on_event`` is called in the thread of ``fit`` with what replica 0 and the controller report.
    """

    def __init__(
        self,
        *args: Any,
        controller_name: str,
        live: LiveReplicas | None,
        on_event: Callable[[dict[str, Any]], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._controller_name = controller_name
        self._live = live
        self._on_event = on_event

    def _create_default_callbacks(self) -> list[Any]:
        """Without what starts a process for nothing: Ray Data's datasets, of which there are none,
        and the cleaner of a dead controller's room where Ray ends with its driver."""
        unneeded: tuple[type, ...] = (DatasetsCallback,)
        if not _has_dashboard():
            unneeded += (PlacementGroupCleanerCallback,)
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not isinstance(one, unneeded)]

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
        kwargs["scaling_policy"] = Scaling(self.scaling_config)  # type: ignore[arg-type]
        kwargs["failure_policy"] = Failures(self.run_config.failure_config)  # type: ignore[arg-type]
        controller: Any = ray.remote(**options)(Controller).remote(live=self._live, **kwargs)
        try:
            run = controller.run.remote()
            ended: list[Any] = []
            while not ended:
                ended, _ = ray.wait([run], timeout=EVENTS_S)
                for event in ray.get(controller.drain.remote()):
                    self._on_event(event)
            ray.get(run)
            result: Result = ray.get(controller.get_result.remote())
        except BaseException:  # Ctrl-C too; in a Ray that outlives this run nothing may stay
            with contextlib.suppress(RayError):
                ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
            raise
        return result
