"""Scores and weights, as a person reads of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lepton_ray.config import schema as config
from lepton_ray.data.decision import AnyDecision, Decision
from lepton_ray.data.schema import Schema
from lepton_ray.training.metrics import AHEAD

SHOWN = 12


def score_table(
    experiment: config.Experiment, version: int, test: dict[str, dict[str, float]], rows: int
) -> str:
    """The version's metrics on the test split, and those of what it is measured against."""
    # What a forecast's error is some steps ahead is in the tracker; here is the whole.
    names = [name for name in test["model"] if not AHEAD.search(name)]
    widths = [max(10, len(name) + 2) for name in names]
    titles = {
        "model": f"{experiment.model.name} (version {version})",
        "boosting": "gradient boosting",
        "linear": "linear baseline",
        "baseline": "trivial baseline",
    }

    def line(title: str, cells: list[str]) -> str:
        return f"{title:39}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))

    return "\n".join(
        [
            line(f"score  on {rows} test samples", names),
            *(
                line(f"       {title}", [f"{test[key][name]:.4f}" for name in names])
                for key, title in titles.items()
                if key in test
            ),
        ]
    )


def decision_table(schema: Schema, decided: AnyDecision) -> str:
    """How outputs become answers, where it is not as they are; of the first `SHOWN` labels."""
    if isinstance(decided, Decision):
        told = [(decided.scale, decided.shift, schema.classes[-1], decided.threshold)]
    else:
        each = zip(decided.scale, decided.shift, schema.classes, decided.threshold, strict=True)
        told = list(each)
    lines = [
        f"decide logits times {scale:.4g} plus {shift:.4g}; {name!r} above {threshold:.4f}"
        for scale, shift, name, threshold in told[:SHOWN]
    ]
    if len(told) > SHOWN:
        lines.append(f"       and {len(told) - SHOWN} more labels, in the version's decision.json")
    return "\n".join(lines)


def slice_table(column: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of each group of a column; a dash where a group has none (AUC of one class)."""
    return _table(f"slices of {column}", groups)


def label_table(labels: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of each label, of the `SHOWN` that most samples have."""
    ranked = sorted(labels, key=lambda name: -labels[name]["samples"])
    title = "labels" if len(labels) <= SHOWN else f"labels (the first {SHOWN} of {len(labels)})"
    return _table(title, {name: labels[name] for name in ranked[:SHOWN]})


def same_weights(best: Mapping[str, Any], sha256: str) -> str:
    """What to say of the final training's weights beside the best trial's."""
    if best["state"] != "finished" or not best["weights_sha256"]:
        return ""
    number = f"{best['number']:04d}"
    if best["weights_sha256"] == sha256:
        return f", the same bytes as in trial {number}"
    return f", other bytes than in trial {number}"


def _table(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for metrics in groups.values() for name in metrics))
    widths = [max(10, len(name) + 2) for name in names]

    def line(title: str, cells: list[str]) -> str:
        return f"{title:39.39}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))

    return "\n".join(
        [
            line(title, names),
            *(
                line(f"       {group}", [_cell(name, metrics.get(name)) for name in names])
                for group, metrics in groups.items()
            ),
        ]
    )


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name == "samples" else f"{value:.4f}"
