"""Batch prediction over Ray Data: the same bytes as in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lepton_ray import data, models
from lepton_ray.config import validate
from lepton_ray.errors import InputError
from lepton_ray.pipeline import batch
from lepton_ray.serving import blocks
from lepton_ray.terminal import Silent
from tests import stores
from tests.versions import register


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Age and city, and one of two classes; untrained."""
    root = tmp_path_factory.mktemp("people")
    frame = pd.DataFrame(
        {"age": np.arange(300.0), "city": ["Bonn", "Rom", "Oslo"] * 100, "y": ["no", "yes"] * 150}
    )
    frame.to_csv(root / "people.csv", index=False)
    experiment = validate(
        {
            "name": "people",
            "data": {"kind": "table", "source": str(root / "people.csv"), "target": "y"},
            "model": {"name": "mlp", "width": 8},
        }
    )
    dataset = data.load(experiment.data)
    model = models.build(
        experiment.model, dataset.preprocess.input_shape, 2, dataset.preprocess.facts
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stores.new(root))
        register(experiment, dataset, model, root)
        yield "people/1"


def test_ray_gives_the_bytes_of_one_process(
    cluster: None, people: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"id": i, "age": i / 7, "city": ["Rom", "Ulm"][i % 2]} for i in range(1000)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(blocks, "ROWS", 90)
    outputs = {}
    for name, embedded in (("alone", True), ("ray", False)):
        with monkeypatch.context() as patch:
            patch.setattr(batch, "ALONE", 100)
            patch.setattr(batch.session, "is_embedded", lambda address, e=embedded: e)
            output = tmp_path / f"{name}.parquet"
            done = batch.predict(
                people, [str(source)], output=str(output), keep=["id"], terminal=Silent()
            )
            assert (done["rows"], done["parts"]) == (1000, 12)
            outputs[name] = output.read_bytes()
    assert outputs["alone"] == outputs["ray"]

    rows[777]["age"] = None
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "wrong.csv"
    with pytest.raises(InputError, match="^row 777, field 'age': must be a finite number"):
        batch.predict(people, [str(source)], output=str(output), terminal=Silent())
    assert not output.exists()
