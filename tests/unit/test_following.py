"""A replica that follows: whatever goes wrong, it asks again, and not in haste."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from lepton_ray.serving import app


@pytest.mark.parametrize("wrong", ["change", "tell"])
def test_a_replica_asks_again_after_any_error(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ASK_S", 0.01)
    calls = {"change": 0, "tell": 0}
    problems: list[Exception] = []

    async def go() -> None:
        done = asyncio.Event()

        async def call(name: str) -> None:
            calls[name] += 1
            if calls["tell"] == 5:
                done.set()
            if name == wrong:
                raise KeyError("of no kind that was foreseen")

        replica = SimpleNamespace(
            _change=lambda present: call("change"),
            _tell=lambda: call("tell"),
            _cannot_follow=problems.append,
        )
        following = asyncio.create_task(app.Endpoint._follow(replica, None))
        async with asyncio.timeout(60):
            await done.wait()
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following

    asyncio.run(go())
    assert calls["change"] - calls["tell"] in (0, 1), "one look for each question"
    assert len(problems) >= 4
