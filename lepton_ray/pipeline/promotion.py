"""Which version is the champion: promoted through the gate, tried, compared."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lepton_ray import data
from lepton_ray.config import load
from lepton_ray.config.schema import Canary, Experiment
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import GateError, InputError, ModelError
from lepton_ray.pipeline import switching
from lepton_ray.pipeline.checks import measure_served, score
from lepton_ray.serving.runtime import Runtime
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import endpoints, gate, registry
from lepton_ray.tracking.gate import Check
from lepton_ray.tracking.registry import ModelVersion
from lepton_ray.training import baselines
from lepton_ray.training.metrics import direction


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
    champion = registry.find_champion(version.name)
    if champion is not None and champion.version == version.version:
        terminal.say(f"gate   {version.name}@champion is version {version.version} already")
        return {"promoted": True, "checks": []}
    checks = check_gate(experiment, version, test, dataset, champion)
    registry.promote(version, instead_of=champion.version if champion else None)
    terminal.say(f"{_passed(checks)}: {version.name}@champion is version {version.version}")
    return {"promoted": True, "checks": [asdict(check) for check in checks]}


def check_gate(
    experiment: Experiment,
    version: ModelVersion,
    test: dict[str, dict[str, float]],
    dataset: Dataset,
    champion: ModelVersion | None,
) -> list[Check]:
    """The checks of a version that passes its experiment's gate.

    Raises:
        GateError: when a rule does not hold, with by how much.
    """
    rules = experiment.gate
    rivals: dict[str, float | None] = {
        rival: test[rival][rules.metric] for rival in rules.beats if rival in test
    }
    if "champion" in rules.beats and champion is not None:
        rivals["champion"] = score(Runtime.load(champion.folder()), dataset)[rules.metric]
    value = test["model"][rules.metric]
    served = measure_served(version, dataset) if gate.asks_for_serving(rules) else None
    checks = gate.decide(rules, value, rivals, direction(rules.metric), served)
    if not all(check.passed for check in checks):
        raise GateError(_missed(version, f"{rules.metric} {value:.4f}", checks))
    return checks


def try_canary(
    experiment: Experiment,
    version: ModelVersion,
    test: dict[str, dict[str, float]],
    dataset: Dataset,
    share: float | None,
    terminal: Terminal,
) -> dict[str, Any]:
    """Try a version that passes its gate on a share of the champion's callers.

    Args:
        share: default as its experiment says.

    Raises:
        GateError, ModelError: see `check_gate` and `endpoints.start_canary`.
    """
    settings = experiment.serve.canary or Canary()
    champion = registry.find_champion(version.name)
    checks = check_gate(experiment, version, test, dataset, champion)
    canary = endpoints.start_canary(version, share or settings.share, settings)
    terminal.say(
        f"{_passed(checks)}: {version.name}/{version.version} is tried on {canary.share:.0%} of "
        f"callers beside version {canary.instead_of}, for {canary.minutes:g} minutes"
    )
    return {
        "promoted": False,
        "canary": canary.to_json(),
        "checks": [asdict(check) for check in checks],
    }


def promote(reference: str, terminal: Terminal) -> dict[str, Any]:
    """Take a registered version through the gate of its experiment, on the data it was trained on.

    Raises:
        GateError, ModelError: see `pass_gate`.
    """
    version = registry.resolve(reference)
    done = pass_gate(*_measured(version), terminal)
    return {"name": version.name, "version": version.version, **done}


def canary(reference: str, terminal: Terminal) -> dict[str, Any]:
    """Try ``NAME/8``, or ``NAME/8=10%`` for that share of callers; ``NAME`` ends what is tried.

    Raises:
        InputError: for a share that is none.
        GateError, ModelError: see `try_canary`.
    """
    reference, equals, share = reference.partition("=")
    part = _share(share) if equals else None
    if "/" not in reference and "@" not in reference:
        if equals:
            raise InputError(
                f"a share is of a version: {reference}/8={share}; {reference} alone ends what is "
                "tried"
            )
        return switching.end_canary(reference, terminal)
    version = registry.resolve(reference)
    if part is not None and _passed_before(version):
        settings = load(version.folder() / "experiment.yaml").serve.canary or Canary()
        made = endpoints.start_canary(version, part, settings)
        terminal.say(f"{version.name}/{version.version} is tried on {made.share:.0%} of callers")
        return {"name": version.name, "version": version.version, "canary": made.to_json()}
    done = try_canary(*_measured(version), part, terminal)
    return {"name": version.name, "version": version.version, **done}


def _passed_before(version: ModelVersion) -> bool:
    """It is tried beside this champion already."""
    now = endpoints.tried(version.name).canary
    champion = registry.find_champion(version.name)
    return (
        now is not None
        and champion is not None
        and (now.version, now.instead_of) == (version.version, champion.version)
    )


def _share(text: str) -> float:
    """10% or 0.1.

    Raises:
        InputError: when it is not above 0 and at most 1.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"a canary's share must be like 10% or 0.1, but got {text!r}")
    return share


def _measured(
    version: ModelVersion,
) -> tuple[Experiment, ModelVersion, dict[str, dict[str, float]], Dataset]:
    """A version with its experiment, and its scores and the baselines' on its data."""
    experiment = load(version.folder() / "experiment.yaml")
    dataset = dataset_of(version, experiment)
    test = {
        "model": score(Runtime.load(version.folder()), dataset),
        **baselines.measure(dataset, experiment.train.seed),
    }
    return experiment, version, test, dataset


def compare(references: list[str], terminal: Terminal) -> dict[str, Any]:
    """Metrics of versions side by side on the first one's test split, and how often they agree.

    Raises:
        ModelError: when the data of the first one have changed since.
    """
    versions = [registry.resolve(reference) for reference in references]
    experiment = load(versions[0].folder() / "experiment.yaml")
    dataset = dataset_of(versions[0], experiment)
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
        agreement = [
            float(np.mean([own == first for own, first in zip(labels, answered[0], strict=True)]))
            for labels in answered
        ]
        cells = "".join(f"{share:>{width}.4f}" for share in agreement)
        lines.append(f"{'agrees with first':20}{cells}")
    terminal.say("\n".join(lines))
    return {
        "versions": titles,
        "samples": len(dataset.test),
        "metrics": scores,
        "agreement": agreement,
    }


def _labels(runtime: Runtime, dataset: Dataset) -> list[Any]:
    """The class of each test sample, or its set of labels."""
    chosen = runtime.decision.chosen(runtime.predict_columns(dataset.test_columns))
    names = np.array(runtime.schema.classes)
    if chosen.ndim == 1:
        return list(names[chosen])
    return [frozenset(names[own == 1]) for own in chosen]


def dataset_of(version: ModelVersion, experiment: Experiment) -> Dataset:
    """The data a version was trained on.

    Raises:
        ModelError: when they have changed: its training samples could now be in the test split.
    """
    dataset = data.load(experiment.data, model=experiment.model.name)
    trained_on = registry.manifest(version)["data_digest"]
    if dataset.digest != trained_on:
        raise ModelError(
            f"the data of {version.name}/{version.version} have changed since it was trained "
            f"(digest {trained_on[:12]}, now {dataset.digest[:12]}), so that it cannot be scored "
            "fairly: train on the data as they are, with lepton-ray run"
        )
    return dataset


def _passed(checks: list[Check]) -> str:
    return f"gate   passed ({'; '.join(c.rule for c in checks) or 'no rules'})"


def _missed(version: ModelVersion, value: str, checks: list[Check]) -> str:
    return "\n".join(
        [
            f"{version.name}/{version.version} has {value} on the test split and does not pass the "
            "gate:",
            *(f"  {c.rule}: missed by {c.missed_by:.4f}" for c in checks if not c.passed),
        ]
    )
