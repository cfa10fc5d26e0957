"""Experiments of each kind of data train from the files that people have, if only for a while."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_ray.config import load
from lepton_ray.training.metrics import direction
from tests import stores

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "epochs", "more"),
    [
        pytest.param("breast_cancer", 5, [], marks=pytest.mark.soak),  # as german_credit
        ("diabetes", 20, []),
        ("german_credit", 10, []),
        ("fashion_mnist", 1, ["model.width=8"]),
        ("movie_snippets", 5, []),
        ("movielens_100k", 2, []),
        ("i94_traffic", 1, []),
    ],
)
def test_it_does_better_than_the_trivial_baseline(
    tmp_path: Path, name: str, epochs: int, more: list[str]
) -> None:
    file = REPO / "experiments" / f"{name}.yaml"
    fetch = [sys.executable, "experiments/fetch.py", "--for", str(file.relative_to(REPO))]
    fetched = subprocess.run(fetch, cwd=REPO, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"no data: python {' '.join(fetch[1:])}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lepton_ray", "train", str(file), "--json"),
            *(f"--set=storage={tmp_path}/results", f"--set=train.epochs={epochs}"),
            *(f"--set={setting}" for setting in more),
        ],
        cwd=REPO,
        env=os.environ | {"MLFLOW_TRACKING_URI": stores.new(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    test = json.loads(done.stdout)["register"]["test"]
    metric = load(file).gate.metric
    ours, trivial = (test[who][metric] for who in ("model", "baseline"))
    assert ours < trivial if direction(metric) == "min" else ours > trivial
