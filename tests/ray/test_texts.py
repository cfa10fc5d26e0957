"""Texts from a file to an answer: trained on two replicas, gated, served and asked."""

from __future__ import annotations

from pathlib import Path

import pytest

import lepton_ray
from lepton_ray.config import loads
from lepton_ray.pipeline.run import Run
from tests import stores
from tests.apps import WORDS, write_reviews

TEXTS = """
name: reviews
data:
  kind: text
  source: reviews.csv
  text: text
  target: mood
  split: {test: given, column: part}
model: {name: text_bag, width: 8}
train: {epochs: 10, batch: 16, optimizer: {name: adamw, lr: 0.05}}
workers: {min: 1, max: 2}
gate: {metric: accuracy, at_least: 0.9, beats: [baseline]}
"""


@pytest.mark.slow
def test_texts_go_from_a_file_to_an_answer(
    cluster: None, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stores.new(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "reviews.csv")
    made = Run(loads(TEXTS, settings=[f"serve.port={port}"]), "run").go()
    assert made["gate"]["promoted"]
    assert made["serve"]["checked"] == 32, "HTTP answers as load_model does"
    assert made["register"]["test"]["model"]["accuracy"] > 0.9
    rows = [{"text": " ".join(WORDS[mood])} for mood in ("good", "bad")]
    answers = lepton_ray.load_model("reviews@champion").predict(rows)
    assert [answer.label for answer in answers] == ["good", "bad"]
