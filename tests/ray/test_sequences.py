"""A ranking from a file to an answer: tuned, trained on two replicas, gated, served and asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lepton_ray
from lepton_ray.config import validate
from lepton_ray.pipeline.run import Run
from tests import stores


@pytest.mark.slow
def test_a_ranking_goes_from_a_file_to_an_answer(
    cluster: None, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}")
        for user in range(60)
        for item in rng.permutation(np.arange(user % 2, 40, 2))[:12]
    ]
    taken = pd.DataFrame(rows, columns=["who", "what"]).assign(at=rng.permutation(len(rows)))
    taken.to_csv("taken.csv", index=False)
    made = Run(
        validate(
            {
                "name": "taken",
                "data": {
                    "kind": "interactions",
                    "source": "taken.csv",
                    "user": "who",
                    "item": "what",
                    "time": "at",
                    "task": "ranking",
                },
                "model": {"name": "two_tower", "width": 8},
                "train": {
                    "epochs": 8,
                    "batch": 32,
                    "optimizer": {"name": "adamw", "lr": 0.02},
                },
                "workers": {"min": 2, "max": 2},
                "gate": {"metric": "ndcg", "beats": ["baseline"]},
                "serve": {"port": port},
            }
        ),
        "run",
    ).go()
    assert made["gate"]["promoted"]
    assert made["serve"]["checked"] == 32, "HTTP answers as load_model does"
    assert made["register"]["test"].keys() == {"model", "baseline", "linear"}
    (answer,) = lepton_ray.load_model("taken@champion").predict([{"who": "u3"}], top_k=5)
    had = set(taken[taken.who == "u3"].sort_values("at").what[:-1])
    assert len(answer.items) == 5
    assert not had & set(answer.items)
