"""Ray Train with our controller."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from lepton_ray.data import Dataset
from lepton_ray.errors import ClusterError, TrainingError
from lepton_ray.pipeline import Run
from lepton_ray.training.digest import state_sha256
from lepton_ray.training.loop import Replica
from lepton_ray.training.trainer import train
from tests.ray.conftest import experiment


def test_two_workers_end_with_the_bytes_of_one_process(
    reference: ray.ObjectRef, dataset: Dataset, tmp_path: Path
) -> None:
    events: list[dict] = []
    result = train(experiment(), reference, folder=tmp_path, on_event=events.append)
    alone = Replica(experiment(), dataset)
    for _ in alone.epochs():
        pass
    assert state_sha256(result.weights) == state_sha256(alone.state.final_weights())
    assert result.links == alone.state.links
    assert result.history == alone.state.history
    assert [e["epoch"] for e in events if e["kind"] == "epoch"] == [1, 2, 3]
    assert next(e for e in events if e["kind"] == "start")["replicas"] == 2


def test_a_finished_training_resumes_to_its_own_end(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    """The storage is the workers' and the driver's, whatever their working folders."""
    one = experiment(workers={"min": 1, "max": 1})
    first = train(one, reference, folder=tmp_path)
    events: list[dict] = []
    again = train(one, reference, folder=tmp_path, on_event=events.append)
    assert next(e for e in events if e["kind"] == "start")["step"] == first.steps
    assert state_sha256(again.weights) == state_sha256(first.weights)


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ({"min": 3, "max": 3}, "needs 3 CPU, .* has 2: 1 CPU are missing; lower workers.min"),
        ({"min": 1, "max": 1, "cpus": 2.5}, "needs 2.5 CPU, .* has 2: 0.5 CPU are missing"),
        ({"min": 2, "max": 2, "gpus": 1}, "needs 2 GPU, .* has 0: 2 GPU are missing"),
    ],
)
def test_a_cluster_that_is_too_small_is_told_and_not_waited_for(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match=said):
        Run(experiment(workers=workers), "train").go()
    assert not (tmp_path / "lepton_results").exists()


def test_an_exception_of_the_model_ends_the_run_with_its_traceback(
    reference: ray.ObjectRef, tmp_path: Path
) -> None:
    events: list[dict] = []
    broken = experiment(model={"name": "tests.nets:explode"}, workers={"min": 1, "max": 1})
    with pytest.raises(TrainingError, match=r"nets.py.*\n.*this model cannot be trained"):
        train(broken, reference, folder=tmp_path, on_event=events.append)
    verdicts = [(e["reason"], e["retry"]) for e in events if e["kind"] == "failure"]
    assert verdicts == [
        ("an exception, tried once more", True),
        ("the same exception twice at step 0", False),
    ]
