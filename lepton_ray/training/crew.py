"""The live replicas of a run: actors that Ray starts where there is room, and again when they die.

A pending one is the demand by which an autoscaler adds a node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import ray

from lepton_ray.training.elasticity import NodeView, possible_workers
from lepton_ray.training.membership import LeftError
from lepton_ray.training.membership.coordinator import Coordinator
from lepton_ray.training.membership.generations import Standing


class ReplicaError(Exception):
    """What a replica's training function raised, in a form that crosses processes.

    Attributes:
        connection: it lost its peers; the cause is elsewhere.
        fatal: one of this package's own errors.
    """

    def __init__(self, step: int, text: str, connection: bool, fatal: bool) -> None:
        super().__init__(step, text, connection, fatal)
        self.step, self.text, self.connection, self.fatal = step, text, connection, fatal

    def __str__(self) -> str:
        return self.text


class Actor:
    """Runs one live replica."""

    def run(self, work: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> None:
        with contextlib.suppress(LeftError):
            work(config)


class Crew:
    """Keeps up to ``size`` live replicas.

    Args:
        each: resources of one.
        labels: which nodes they run on, and Ray Train's group does not; none for all nodes.
        work: what one runs, with its name as ``config["live"]``.
        tell: gets an event for one that ends with an exception.
    """

    def __init__(
        self,
        size: int,
        each: dict[str, float],
        labels: dict[str, str],
        work: Callable[[dict[str, Any]], Any],
        config: dict[str, Any],
        coordinator: Coordinator,
        tell: Callable[..., None],
    ) -> None:
        self._free_names = [f"live {number}" for number in range(size)]
        self._each = each
        self.labels = labels
        self._work = work
        self._config = config
        self._coordinator = coordinator
        self._tell = tell
        self._raised: set[str] = set()
        self._actors: dict[str, Any] = {}
        self._runs: dict[Any, str] = {}

    def keep(self, nodes: Sequence[NodeView]) -> None:
        """Start those that are missing, ask those on draining nodes to leave."""
        self._pass_on_drains(nodes)
        if self._runs:
            ended, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
            for run in ended:
                self._ended(run)
        options = {
            "num_cpus": self._each.get("CPU", 0),
            "num_gpus": self._each.get("GPU", 0),
            "label_selector": self.labels,
        }
        while self._free_names:
            name = self._free_names.pop(0)
            actor: Any = (
                ray.remote(Actor).options(max_restarts=-1, max_task_retries=-1, **options).remote()
            )
            self._actors[name] = actor
            self._runs[actor.run.remote(self._work, {**self._config, "live": name})] = name

    def _pass_on_drains(self, nodes: Sequence[NodeView]) -> None:
        for node in nodes:
            if node.draining:
                self._coordinator.ask_to_leave(node.id)

    def staying(self, nodes: Sequence[NodeView]) -> int:
        """How many train on nodes that are not draining."""
        stay = {node.id for node in nodes if not node.draining}
        connected = self._coordinator.connected()
        return sum(s.member and not s.guaranteed and s.node in stay for s in connected)

    def make_room(self, nodes: Sequence[NodeView], minimum: int) -> None:
        """Give the guaranteed replicas, which are to start, the room they need.

        Those that have not come yet go, because they would take it first; of those that train, as
        many as are in the way, but not the last one: it holds the state, until all is done. On
        nodes of their own nobody is in the way, and the missing come again. They never come first:
        the first replica of a run says how all compute.
        """
        if self.labels:
            if self._actors:
                self.keep(nodes)
            return
        self._pass_on_drains(nodes)
        training = {s.id.partition("@")[0]: s for s in self._coordinator.connected()}
        for name in set(self._actors) - set(training):
            self._end(name)
        missing = minimum - possible_workers(nodes, self._each)
        if missing > 0:
            for name in in_the_way(missing, [training[n] for n in self._actors if n in training]):
                self._end(name.partition("@")[0])

    def stop(self) -> None:
        """End all of them."""
        for name in list(self._actors):
            self._end(name)

    def _end(self, name: str) -> None:
        run = next(run for run, of in self._runs.items() if of == name)
        del self._runs[run]
        ray.cancel(run, recursive=False)  # or Ray tells the driver that it will be tried again
        ray.kill(self._actors.pop(name))
        self._free_names.append(name)

    def _ended(self, run: Any) -> None:
        """One that left comes again, one that raised once more: a fault of the machine need not
        come back, one of the code does. What this package raises on purpose would be raised again.
        """
        name = self._runs[run]
        self._end(name)
        try:
            ray.get(run)
        except Exception as error:
            cause = getattr(error, "cause", error)
            last = (str(cause).strip() or repr(cause)).splitlines()[-1]
            if name in self._raised or (isinstance(cause, ReplicaError) and cause.fatal):
                self._free_names.remove(name)
            else:
                last += " (it is tried once more)"
            self._raised.add(name)
            self._tell(kind="replica_failed", reason=f"{name}: {last}")


def in_the_way(missing: int, training: Sequence[Standing]) -> list[str]:
    """Ids of the live replicas to end so that ``missing`` guaranteed ones find room."""
    if all(s.done for s in training):
        return [s.id for s in training]
    return [s.id for s in training[1:]][-missing:]
