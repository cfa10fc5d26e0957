"""The versions of a replica: batches, a canary that fails, copies to a shadow."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lepton_ray.config.schema import Rule
from lepton_ray.serving.batcher import Batcher
from lepton_ray.serving.runtime import Runtime
from lepton_ray.serving.versions import COPIES, Versions
from lepton_ray.tracking.canary import Canary


class Model:
    """A runtime that says its version for each row."""

    answered = Runtime.answered

    def __init__(
        self,
        version: int,
        before: Callable[[Any], None] = lambda x: None,
        task: str = "classification",
    ) -> None:
        self.version = version
        self.schema = SimpleNamespace(task=task)
        self.before = before
        self.batches: list[int] = []

    def predict_columns(self, columns: dict[str, Any]) -> Any:
        self.batches.append(len(columns["x"]))
        self.before(columns["x"])
        return np.column_stack([columns["x"], np.full(len(columns["x"]), float(self.version))])

    def agree(self, found: Any, other: Any, theirs: Any, tolerance: float) -> int:
        return int((found[:, 0] == theirs[:, 0]).sum())


def raises(_: Any) -> None:
    raise RuntimeError("a version that raises")


def columns(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float64)}


def canary(share: float = 1.0) -> Canary:
    return Canary(
        id="a", version=2, share=share, instead_of=1, started_s=0, minutes=1,
        sticky="x-session-id", rule=Rule(),
    )  # fmt: skip


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.01)


def test_what_waits_while_the_model_is_busy_is_one_batch() -> None:
    busy = threading.Event()
    model = Model(1, lambda x: busy.wait(60) if x[0] == 0 else None)

    async def go() -> None:
        batcher = Batcher(model, rows=4)
        first = asyncio.ensure_future(batcher.run(columns(0)))
        await until(lambda: model.batches == [1])
        others = [asyncio.ensure_future(batcher.run(columns(n))) for n in range(1, 7)]
        large = asyncio.ensure_future(batcher.run(columns(*range(10, 20))))
        await asyncio.sleep(0)
        busy.set()
        await first
        for number, answer in enumerate(await asyncio.gather(*others), 1):
            assert answer[:, 0].tolist() == [number]
        assert (await large)[:, 0].tolist() == list(range(10, 20))

    asyncio.run(go())
    assert model.batches[:2] == [1, 4]
    assert max(model.batches) == 4
    assert sum(model.batches) == 17


def test_a_request_in_parts_outlives_its_version() -> None:
    """A champion that is replaced while a large request is half way."""
    busy = threading.Event()
    model = Model(1, lambda x: busy.wait(60) if x[0] == 0 else None)

    async def go() -> None:
        batcher = Batcher(model, rows=4)
        threads = {*threading.enumerate()}
        whole = asyncio.ensure_future(batcher.run(columns(*range(40))))
        await until(lambda: model.batches == [4])
        gone, batcher = weakref.ref(batcher), None
        busy.set()
        assert (await whole)[:, 0].tolist() == list(range(40))
        del whole
        await until(lambda: gone() is None)
        await until(lambda: {*threading.enumerate()} <= threads)

    asyncio.run(go())


def test_a_brief_pass_needs_no_thread() -> None:
    threads: dict[int, bool] = {}

    def note(x: Any) -> None:
        threads[len(x)] = threading.current_thread() is threading.main_thread()

    async def go() -> None:
        batcher = Batcher(Model(1, note), rows=8, brief=2)
        for values in ((1,), (1, 2), (1, 2, 3)):
            assert (await batcher.run(columns(*values)))[:, 0].tolist() == list(values)

    asyncio.run(go())
    assert threads == {1: True, 2: True, 3: False}


@pytest.mark.parametrize("brief", [0, 8])
def test_a_request_that_fails_fails_alone(brief: int) -> None:
    def fail_at_13(x: Any) -> None:
        if 13 in x:
            raise ValueError("thirteen")

    async def go() -> None:
        batcher = Batcher(Model(1, fail_at_13), rows=8, brief=brief)
        runs = [batcher.run(columns(n)) for n in (1, 13, 2)]
        one, bad, two = await asyncio.gather(*runs, return_exceptions=True)
        assert (one[0, 0], two[0, 0]) == (1, 2)
        assert isinstance(bad, ValueError)

    asyncio.run(go())


def test_a_canary_that_raises_is_answered_by_the_champion_and_counted() -> None:
    async def go() -> None:
        versions = Versions(Batcher(Model(1), rows=8), 60.0)
        versions.change(versions.champion, (canary(), Batcher(Model(2, raises), rows=8)), None)
        answers = [await versions.infer(columns(n), f"caller {n}") for n in range(20)]
        assert {runtime.version for runtime, _ in answers} == {1}
        attempt, tally = versions.take()
        assert (attempt, tally[2].requests, tally[2].errors) == ("a", 20, 20)
        assert versions.take() == ("a", {}), "told once"
        versions.give_back("another", tally)
        assert versions.take()[1] == {}, "of another attempt"
        versions.give_back(attempt, tally)
        assert versions.take()[1][2].errors == 20

    asyncio.run(go())


def test_a_canary_that_hangs_is_answered_by_the_champion_and_counted() -> None:
    held = threading.Event()

    async def go() -> None:
        versions = Versions(Batcher(Model(1), rows=8), 0.05)
        slow = Batcher(Model(2, lambda x: held.wait(60)), rows=8)
        versions.change(versions.champion, (canary(), slow), None)
        answers = [await versions.infer(columns(n), f"caller {n}") for n in range(3)]
        assert {runtime.version for runtime, _ in answers} == {1}
        counts = versions.take()[1][2]
        assert (counts.requests, counts.errors) == (3, 3)
        held.set()

    asyncio.run(go())


def test_items_that_are_not_to_be_answered_make_no_error() -> None:
    """The scores of a ranking are minus infinity for what a user has had."""

    def hide(x: Any) -> None:
        x[:] = -np.inf

    async def go() -> None:
        champion = Batcher(Model(1, hide, "ranking"), rows=8)
        versions = Versions(champion, 60.0)
        tried = Batcher(Model(2, hide, "ranking"), rows=8)
        shadow = Model(3, hide, "ranking")
        versions.change(champion, (canary(0.5), tried), shadow)
        for n in range(40):
            await versions.infer(columns(n), f"caller {n}")
            await asyncio.sleep(0)
        await until(lambda: {2, 3} <= {v for v, c in versions._tally.items() if c.compared})
        tally = versions.take()[1]
        assert tally[2].requests > 5
        assert (tally[2].errors, tally[3].errors) == (0, 0)

    asyncio.run(go())


def test_rows_that_the_champion_cannot_answer_either_are_not_the_canary_s_error() -> None:
    def nothing(x: Any) -> None:
        x[:] = np.nan

    async def go() -> None:
        champion = Batcher(Model(1, nothing), rows=8)
        versions = Versions(champion, 60.0)
        versions.change(champion, (canary(), Batcher(Model(2, nothing), rows=8)), None)
        await versions.infer(columns(1), "caller")
        assert versions.take()[1] == {}

    asyncio.run(go())


def test_a_share_goes_to_the_canary_whose_answers_are_compared() -> None:
    async def go() -> None:
        versions = Versions(Batcher(Model(1), rows=8), 60.0)
        versions.change(versions.champion, (canary(0.25), Batcher(Model(2), rows=8)), None)
        by = {}
        for n in range(400):
            (runtime, _) = await versions.infer(columns(n), f"caller {n}")
            by[n] = runtime.version
            await asyncio.sleep(0)
        again = {n: (await versions.infer(columns(n), f"caller {n}"))[0].version for n in by}
        assert again == by, "a caller stays"
        share = list(by.values()).count(2) / len(by)
        assert 0.15 < share < 0.35
        asked = [(await versions.infer(columns(1), "caller 1", v))[0].version for v in ("1", "2")]
        assert asked == [1, 2], "a version that was asked for"
        tally: dict[int, int] = {}

        def all_compared() -> bool:
            for version, counts in versions.take()[1].items():
                tally[version] = tally.get(version, 0) + counts.compared + counts.dropped
                assert counts.agreed == counts.compared
            return tally.get(2, 0) >= 2 * 400 * share + 1

        await until(all_compared)

    asyncio.run(go())


@pytest.mark.parametrize("before", [lambda x: None, raises], ids=["answers", "raises"])
def test_a_shadow_gets_copies_and_changes_no_answer(before: Callable[[Any], None]) -> None:
    shadow = Model(3, before)

    async def go() -> None:
        versions = Versions(Batcher(Model(1), rows=8), 60.0)
        versions.change(versions.champion, None, shadow)
        for n in range(20):
            runtime, found = await versions.infer(columns(n), f"caller {n}")
            assert (runtime.version, found[0, 1]) == (1, 1)
        await until(lambda: len(shadow.batches) == 20)
        await until(lambda: versions._tally[3].requests == 20)
        counts = versions.take()[1][3]
        wrong = before is raises
        assert (counts.errors, counts.compared) == ((20, 0) if wrong else (0, 20))

    asyncio.run(go())


def test_copies_are_dropped_and_counted_when_a_shadow_is_behind() -> None:
    held = threading.Event()
    shadow = Model(3, lambda x: held.wait(60))

    async def go() -> None:
        versions = Versions(Batcher(Model(1), rows=8), 60.0)
        versions.change(versions.champion, None, shadow)
        for n in range(COPIES + 30):
            await versions.infer(columns(n), "caller")
        dropped = versions.take()[1][3].dropped
        assert 25 <= dropped <= 30, "the answers did not wait"
        held.set()

    asyncio.run(go())
