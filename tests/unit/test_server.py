"""The job server, where the real one is hard to bring into a state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lepton_ray.jobs import server
from lepton_ray.jobs.server import Server


@pytest.mark.parametrize(("said", "tries"), [(server.NOT_READY, 3), ("the name is taken", 1)])
def test_a_cluster_that_has_just_started_is_waited_for(
    said: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def submit_job(name: str) -> str:
        asked.append(name)
        if len(asked) < 3:
            raise RuntimeError(f"Request failed with status code 500: {said}, try again later.")
        return "job-1"

    monkeypatch.setattr(server, "PAUSE_S", 0.0)
    reached = Server.__new__(Server)
    reached._client = SimpleNamespace(submit_job=submit_job)
    if tries == 3:
        assert reached.submit(name="a") == "job-1"
    else:
        with pytest.raises(RuntimeError, match=said):
            reached.submit(name="a")
    assert len(asked) == tries
