"""How many rows go together, from what forward passes take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lepton_ray.config.schema import Batching, Serve
from lepton_ray.serving.sweep import Plan, choose, measure, plan

MS = 0.001


@pytest.mark.parametrize(
    ("table", "p99_ms", "chosen"),
    [
        # A row is cheaper in company: the largest batch, and one that is not full waits a little.
        ({1: 1 * MS, 8: 2 * MS, 64: 8 * MS}, 50, Plan(64, 1 * MS, 0)),
        # The same with less time: 8 ms would be more than a quarter of 20.
        ({1: 1 * MS, 8: 2 * MS, 64: 8 * MS}, 20, Plan(8, 1 * MS, 0)),
        # It costs the same whatever the batch: enough to make little of the way to the thread.
        ({1: 1 * MS, 2: 2 * MS, 8: 8 * MS, 64: 64 * MS}, 400, Plan(2, 0, 0)),
        # Larger ones are worse.
        ({1: 1 * MS, 8: 4 * MS, 64: 60 * MS}, 400, Plan(8, 0, 0)),
        # Up to 16 rows are through sooner than a thread has its turn.
        ({1: 0.1 * MS, 16: 0.2 * MS, 64: 0.4 * MS}, 50, Plan(64, 0.1 * MS, 16)),
        # Even one row takes too long.
        ({1: 100 * MS}, 50, Plan(1, 0, 0)),
    ],
)
def test_the_choice(table: dict[int, float], p99_ms: float, chosen: Plan) -> None:
    assert choose(table, p99_ms * MS) == chosen


class Slow:
    """A model of which a row takes 5 ms by a clock of its own."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, kind: str = "number", row_s: float = 0.005
    ) -> None:
        self.now_s = 0.0
        self.row_s = row_s
        self.schema = SimpleNamespace(columns=[SimpleNamespace(kind=kind)])
        monkeypatch.setattr("time.perf_counter", lambda: self.now_s)

    def warm_up(self, rows: int) -> None:
        self.now_s += self.row_s * rows


def test_it_is_measured_up_to_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(measure(Slow(monkeypatch), 64, 0.1)) == [1, 2, 4, 8]
    assert list(measure(Slow(monkeypatch), 3, 10.0)) == [1, 2, 3]


@pytest.mark.parametrize(("kind", "brief"), [("number", 2), ("text", 0)])
def test_a_text_may_take_longer_than_the_model(
    monkeypatch: pytest.MonkeyPatch, kind: str, brief: int
) -> None:
    assert plan(Slow(monkeypatch, kind=kind, row_s=1e-4), Batching(max=4)).brief == brief


def test_what_the_experiment_says_itself_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    assert plan(slow, Batching()) == Plan(1, 0, 0)
    assert plan(slow, Batching(max=16)) == Plan(16, 0, 0)
    assert plan(slow, Batching(wait_ms=3)) == Plan(1, 0.003, 0)
    slow.now_s = 0
    assert plan(slow, Batching(max=16, wait_ms=3)) == Plan(16, 0.003, 0)
    assert slow.now_s == 0, "nothing was measured"
    assert Serve.model_validate({"batch": "auto"}).batch == Batching()
