"""Experiments of each kind of data train from the files that people have, if only for a while."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lepton_ray.config import load
from lepton_ray.pipeline.run import Run
from lepton_ray.training.metrics import direction
from tests import stores

REPO = Path(__file__).parents[2]
SETTINGS = {
    "breast_cancer": ["train.epochs=5"],
    "diabetes": ["train.epochs=20"],
    "fashion_mnist": ["train.epochs=1", "model.width=8"],
    "german_credit": ["train.epochs=10"],
    "i94_traffic": ["train.epochs=1"],
    "movie_snippets": ["train.epochs=5"],
    "movielens_100k": ["train.epochs=2"],
}
OFTEN = ("diabetes", "i94_traffic")  # of kinds that no other test takes through a whole run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n in OFTEN else pytest.param(n, marks=pytest.mark.soak) for n in SETTINGS],
)
def test_it_does_better_than_the_trivial_baseline(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = REPO / "experiments" / f"{name}.yaml"
    fetch = [sys.executable, "experiments/fetch.py", "--for", str(file.relative_to(REPO))]
    fetched = subprocess.run(fetch, cwd=REPO, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"no data: python {' '.join(fetch[1:])}")
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    alone = ["workers.min=1", "workers.max=1"]
    asked = load(file, [f"storage={tmp_path}/results", *alone, *SETTINGS[name]])
    test = Run(asked, "train").go()["register"]["test"]
    metric = asked.gate.metric
    ours, trivial = (test[who][metric] for who in ("model", "baseline"))
    assert ours < trivial if direction(metric) == "min" else ours > trivial
