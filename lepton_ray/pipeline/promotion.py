"""Which version is the champion: promoted through the gate, compared, rolled back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lepton_ray import data
from lepton_ray.config import load
from lepton_ray.config.schema import Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import GateError, ModelError
from lepton_ray.jobs.watchers import Terminal
from lepton_ray.pipeline.checks import score
from lepton_ray.serving.runtime import Runtime
from lepton_ray.tracking import gate, registry
from lepton_ray.tracking.gate import Check
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.training import baselines
from lepton_ray.training.metrics import DIRECTIONS


def pass_gate(
    experiment: Experiment,
    version: ModelVersion,
    test: dict[str, dict[str, float]],
    dataset: Dataset,
    terminal: Terminal,
) -> dict[str, Any]:
    """Promote a version if it passes its experiment's gate.

    Args:
        test: metrics on the test split of ``model`` and of the baselines.

    Returns:
        ``promoted`` and the gate's ``checks``.

    Raises:
        GateError: when a rule does not hold, with by how much; nothing is promoted.
        ModelError: when another promotion was quicker.
    """
    rules = experiment.gate
    rivals: dict[str, float | None] = {
        rival: test[rival][rules.metric] for rival in rules.beats if rival in test
    }
    champion = registry.find_champion(version.name)
    if champion is not None and champion.version == version.version:
        terminal.say(f"gate   {version.name}@champion is version {version.version} already")
        return {"promoted": True, "checks": []}
    if "champion" in rules.beats and champion is not None:
        rivals["champion"] = score(Runtime.load(champion.folder()), dataset)[rules.metric]
    value = test["model"][rules.metric]
    checks = gate.decide(rules, value, rivals, DIRECTIONS[rules.metric])
    if not all(check.passed for check in checks):
        raise GateError(_missed(version, f"{rules.metric} {value:.4f}", checks))
    registry.promote(version, instead_of=champion.version if champion else None)
    terminal.say(
        f"gate   passed ({'; '.join(c.rule for c in checks) or 'no rules'}): "
        f"{version.name}@champion is version {version.version}"
    )
    return {"promoted": True, "checks": [asdict(check) for check in checks]}


def promote(reference: str, terminal: Terminal) -> dict[str, Any]:
    """Take a registered version through the gate of its experiment, on the data it was trained on.

    Raises:
        GateError, ModelError: see `pass_gate`.
    """
    version = registry.resolve(reference)
    experiment = load(version.folder() / "experiment.yaml")
    dataset = _dataset_of(version, experiment)
    test = {
        "model": score(Runtime.load(version.folder()), dataset),
        **baselines.measure(dataset, experiment.train.seed),
    }
    done = pass_gate(experiment, version, test, dataset, terminal)
    return {"name": version.name, "version": version.version, **done}


def rollback(name: str, terminal: Terminal) -> dict[str, Any]:
    """Make the champion before the present one champion again; no gate, since it passed one."""
    version = registry.rollback(name)
    terminal.say(f"{name}@champion is version {version.version} again")
    return {"name": name, "version": version.version}


def compare(references: list[str], terminal: Terminal) -> dict[str, Any]:
    """Metrics of versions side by side on the first one's test split, and how often they agree.

    Raises:
        ModelError: when the data of the first one have changed since.
    """
    versions = [registry.resolve(reference) for reference in references]
    experiment = load(versions[0].folder() / "experiment.yaml")
    dataset = _dataset_of(versions[0], experiment)
    runtimes = [Runtime.load(version.folder()) for version in versions]
    scores = [score(runtime, dataset) for runtime in runtimes]
    titles = [f"{version.name}/{version.version}" for version in versions]
    width = max(len(title) for title in titles) + 2
    lines = [f"{'':20}" + "".join(f"{title:>{width}}" for title in titles)]
    for metric in scores[0]:
        cells = "".join(f"{s.get(metric, float('nan')):>{width}.4f}" for s in scores)
        lines.append(f"{metric:20}{cells}")
    agreement = None
    if dataset.schema.classes:
        answered = [_labels(runtime, dataset) for runtime in runtimes]
        agreement = [float((labels == answered[0]).mean()) for labels in answered]
        cells = "".join(f"{share:>{width}.4f}" for share in agreement)
        lines.append(f"{'agrees with first':20}{cells}")
    terminal.say("\n".join(lines))
    return {
        "versions": titles,
        "samples": len(dataset.test),
        "metrics": scores,
        "agreement": agreement,
    }


def _labels(runtime: Runtime, dataset: Dataset) -> Any:
    best = runtime.decision.chosen(runtime.predict_columns(dataset.test_columns))
    return np.array(runtime.schema.classes)[best]


def _dataset_of(version: ModelVersion, experiment: Experiment) -> Dataset:
    """The data a version was trained on.

    Raises:
        ModelError: when they have changed: its training samples could now be in the test split.
    """
    dataset = data.load(experiment.data)
    trained_on = registry.manifest(version)["data_digest"]
    if dataset.digest != trained_on:
        raise ModelError(
            f"the data of {version.name}/{version.version} have changed since it was trained "
            f"(digest {trained_on[:12]}, now {dataset.digest[:12]}), so that it cannot be scored "
            "fairly: train on the data as they are, with lepton-ray run"
        )
    return dataset


def _missed(version: ModelVersion, value: str, checks: list[Check]) -> str:
    return "\n".join(
        [
            f"{version.name}/{version.version} has {value} on the test split and was not promoted:",
            *(f"  {c.rule}: missed by {c.missed_by:.4f}" for c in checks if not c.passed),
        ]
    )
