"""What README.md shows is true: its commands parse and its files exist; experiments load."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lepton_ray.cli import parser
from lepton_ray.config import Experiment, load, loads
from tests.e2e.test_demo import REPO, run

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
LINES = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines() if line]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


def test_every_command_is_one_of_ours() -> None:
    makefile = (REPO / "Makefile").read_text()
    for words in COMMANDS:
        if words[0] == "lepton-ray":
            parser().parse_args(words[1:])
            files = [w for w in words if w.endswith(".yaml")]
            assert all((REPO / f).exists() for f in files), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        else:
            assert (REPO / words[1]).exists(), words


@pytest.mark.parametrize("verb", ["render", "schema", "plan"])
def test_cheap_commands_run_as_they_stand(tmp_path: Path, verb: str) -> None:
    (words,) = [w for w in COMMANDS if w[:2] == ["lepton-ray", verb]]
    arguments = [str(REPO / w) if w.endswith(".yaml") else w for w in words[1:]]
    code, text = run(tmp_path, *arguments)
    assert code == 0, text


def test_the_experiment_of_the_first_screen_loads() -> None:
    (body,) = [body for kind, body in BLOCKS if kind == "yaml"]
    shown, real = loads(body), load(REPO / "experiments" / "digits.yaml")
    assert (shown.data, shown.model, shown.gate) == (real.data, real.model, real.gate)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (REPO / target).exists(), target


@pytest.mark.parametrize(
    "path", sorted((REPO / "experiments").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_experiment_loads(path: Path) -> None:
    load(path)


def test_the_schema_for_editors_is_up_to_date() -> None:
    written = json.loads((REPO / "experiments" / "schema.json").read_text())
    assert written == Experiment.model_json_schema(), "lepton-ray schema > experiments/schema.json"
