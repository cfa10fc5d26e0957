"""Which live replicas come again, and which are asked to leave."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_ray.training import crew
from lepton_ray.training.crew import Crew, ReplicaError
from lepton_ray.training.elasticity import SPOT, NodeView


class Runs:
    """In Ray's place: every run is over at once."""

    def __init__(self) -> None:
        self.begun = 0
        self._raised: dict[int, BaseException] = {}

    def remote(self, kind: type) -> Any:
        def run(*arguments: Any) -> int:
            self.begun += 1
            try:
                kind().run(*arguments)
            except Exception as error:
                self._raised[self.begun] = error
            return self.begun

        actor = SimpleNamespace(run=SimpleNamespace(remote=run))
        made = SimpleNamespace(remote=lambda: actor)
        return SimpleNamespace(options=lambda **options: made)

    def wait(self, runs: list[int], **options: Any) -> tuple[list[int], list[int]]:
        return runs, []

    def get(self, run: int) -> None:
        if run in self._raised:
            raise self._raised[run]

    def cancel(self, run: int, recursive: bool) -> None:
        """It is over."""

    def kill(self, actor: Any) -> None:
        """It is nothing."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(crew, "ray", made)
    return made


def of_one(
    work: Callable[[Any], Any],
    told: list[str],
    asked: list[str] | None = None,
    labels: dict[str, str] = SPOT,
) -> Crew:
    coordinator: Any = SimpleNamespace(
        ask_to_leave=(asked if asked is not None else []).append, connected=list
    )
    return Crew(
        1, {"CPU": 1.0}, labels, work, {}, coordinator, lambda kind, reason: told.append(reason)
    )


def raising(*errors: Exception) -> Callable[[Any], None]:
    left = list(errors)

    def work(config: Any) -> None:
        if left:
            raise left.pop(0)

    return work


def test_one_that_raised_is_tried_once_more(runs: Runs) -> None:
    told: list[str] = []
    here = of_one(raising(OSError("disk"), OSError("disk")), told)
    for _ in range(4):
        here.keep([])
    assert told == ["live 0: disk (it is tried once more)", "live 0: disk"]
    assert runs.begun == 2


def test_one_that_raised_once_comes_back_for_good(runs: Runs) -> None:
    here = of_one(raising(OSError("disk")), [])
    for _ in range(4):
        here.keep([])
    assert runs.begun == 4


def test_what_would_be_raised_again_is_not_tried_again(runs: Runs) -> None:
    told: list[str] = []
    refused = ReplicaError(0, "computes unlike the others", connection=False, fatal=True)
    here = of_one(raising(refused), told)
    for _ in range(4):
        here.keep([])
    assert (runs.begun, told) == (1, ["live 0: computes unlike the others"])


def test_on_nodes_of_their_own_they_come_again_while_the_group_has_no_room(runs: Runs) -> None:
    asked: list[str] = []
    nodes = [
        NodeView(id="stays", free={}, ours=0, draining=False),
        NodeView(id="goes", free={}, ours=0, draining=True),
    ]
    here = of_one(raising(), [], asked)
    here.make_room(nodes, minimum=1)
    assert (asked, runs.begun) == ([], 0), "before the group first ran"
    here.keep(nodes)
    for _ in range(3):
        here.make_room(nodes, minimum=1)
    assert (asked, runs.begun) == (["goes"] * 4, 4)


def test_on_the_groups_nodes_none_start_that_would_take_its_room(runs: Runs) -> None:
    asked: list[str] = []
    nodes = [NodeView(id="goes", free={}, ours=0, draining=True)]
    here = of_one(raising(), [], asked, labels={})
    here.make_room(nodes, minimum=1)
    assert (asked, runs.begun) == (["goes"], 0)
