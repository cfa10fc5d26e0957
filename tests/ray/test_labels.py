"""Several labels a row from a file to an answer: trained on two replicas, gated, served, asked."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from sklearn.datasets import load_digits

import lepton_ray
from lepton_ray.config import validate
from lepton_ray.pipeline.run import Run
from tests import stores


@pytest.mark.slow
def test_labels_go_from_a_file_to_an_answer(
    cluster: None, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    monkeypatch.chdir(tmp_path)
    digits = load_digits(as_frame=True)
    number = digits.target
    says = {"even": number % 2 == 0, "high": number > 4, "looped": number.isin([0, 6, 8, 9])}
    cells = pd.DataFrame(says).apply(lambda row: "|".join(row.index[row]), axis=1)
    digits.data.assign(traits=cells).to_csv("digits.csv", index=False)
    made = Run(
        validate(
            {
                "name": "traits",
                "data": {
                    "kind": "table",
                    "source": "digits.csv",
                    "target": "traits",
                    "separator": "|",
                },
                "model": {"name": "mlp", "width": 64},
                "train": {
                    "epochs": 12,
                    "batch": 64,
                    "optimizer": {"name": "adamw", "lr": 0.005},
                },
                "evaluate": {"calibrate": "temperature", "threshold": "f1"},
                "workers": {"min": 2, "max": 2},
                "gate": {"metric": "f1_macro", "beats": ["baseline", "linear"]},
                "serve": {"port": port},
            }
        ),
        "run",
    ).go()
    assert made["gate"]["promoted"]
    assert made["serve"]["checked"] == 32, "HTTP answers as load_model does"
    assert made["register"]["test"].keys() == {"model", "baseline", "linear", "boosting"}
    assert made["register"]["test"]["model"]["f1_macro"] > 0.9
    assert set(made["register"]["labels"]) == {"even", "high", "looped"}
    model = lepton_ray.load_model("traits@champion")
    assert len(set(model.decision.threshold)) == 3, "each label has its own"
    rows = digits.data[number == 8].head(20).to_dict("records")
    answers = model.predict(rows)
    assert sum(answer.labels == ["even", "high", "looped"] for answer in answers) > 14
