"""A finished run, trained again at another size: equal, or told from which step on it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_ray.errors import DivergenceError, InputError
from lepton_ray.pipeline.run import Run
from lepton_ray.pipeline.verify import verify
from lepton_ray.terminal import Silent
from tests import stores
from tests.ray.conftest import experiment


@pytest.fixture(scope="module")
def run(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stores.new(folder))
        done = Run(experiment(storage=str(folder)), "train").go()
    return str(done["run"])


def again(run: str, epochs: int | None = None) -> dict:
    return verify(run, workers=1, epochs=epochs, address=None, terminal=Silent())


def test_another_size_gives_every_link_and_the_weights(run: str) -> None:
    done = json.loads((Path(run) / "run.json").read_text())["stages"]["train"]
    found = again(run)
    assert found["links"] == len(done["links"]) > 2
    assert found["weights_sha256"] == done["weights_sha256"]


def test_a_part_is_compared_as_far_as_it_goes(run: str) -> None:
    found = again(run, epochs=1)
    assert (found["epochs"], found["weights_sha256"]) == (1, None)
    assert found["links"] == 2  # 10 steps, a link every 5


def test_a_run_that_differs_is_told_from_its_first_step(run: str) -> None:
    state = Path(run) / "run.json"
    before = state.read_text()
    value = json.loads(before)
    links = value["stages"]["train"]["links"]
    links[1][1] = "0" * 64
    state.write_text(json.dumps(value))
    try:
        with pytest.raises(DivergenceError, match=f"differ, first at step {links[1][0]}"):
            again(run, epochs=1)
    finally:
        state.write_text(before)


def test_a_folder_without_a_finished_training_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a run"):
        again(str(tmp_path))
