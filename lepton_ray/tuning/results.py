"""What a study has found: values, the front, the best trial. Pure functions of its records."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lepton_ray.config.schema import Bound, Tune
from lepton_ray.tuning.journal import Prior, TrialRecord

SEED = "train.seed"


def objectives(tune: Tune, record: TrialRecord) -> list[float]:
    """The values of the study's metrics; NaN where a trial did not come to measure one."""
    values = [record.metrics.get(metric, math.nan) for metric in tune.metrics]
    if tune.metrics[0] not in record.metrics and record.values:
        values[0] = record.values[-1]
    return values


def costs(tune: Tune, values: Sequence[float]) -> list[float]:
    """The same with the signs turned so that less is better."""
    return [v if mode == "min" else -v for v, mode in zip(values, tune.modes, strict=True)]


def excesses(constraints: Mapping[str, Bound], metrics: Mapping[str, float]) -> dict[str, float]:
    """How far each constrained metric that was measured is beyond its limits."""
    return {
        name: bound.excess(metrics[name]) for name, bound in constraints.items() if name in metrics
    }


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as good in all and better in one (less is better)."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def complete(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials of the search that finished within the constraints."""
    return [r for r in records if r.state == "finished" and r.feasible and r.kind != "confirm"]


def front(tune: Tune, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that none beats in all metrics, best in the first metric first."""
    found = [(costs(tune, objectives(tune, r)), r) for r in complete(records)]
    kept = [(c, r) for c, r in found if not any(dominates(other, c) for other, _ in found)]
    return [r for _, r in sorted(kept, key=lambda pair: (pair[0], pair[1].number))]


def ranked(tune: Tune, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials, best first; of several metrics the front comes first."""
    if len(tune.metrics) > 1:
        first = front(tune, records)
        numbers = {r.number for r in first}
    else:
        first, numbers = [], set()
    rest = [r for r in complete(records) if r.number not in numbers]
    return first + sorted(rest, key=lambda r: (costs(tune, objectives(tune, r)), r.number))


def best(tune: Tune, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial whose settings win; None when there is none with a value.

    Of trials that were trained again with new seeds, the best on average over those. When a budget
    ended the study before any trial finished, the one that came furthest.
    """
    confirmed = confirmations(tune, records)
    found = ranked(tune, records)
    if confirmed:
        by_mean = min(confirmed, key=lambda c: (c.mean_cost, c.number))
        return next(r for r in found if r.number == by_mean.number)
    if found:
        return found[0]
    partial = [r for r in records if r.state == "pruned" and r.feasible and r.values]
    return min(
        partial, key=lambda r: (-len(r.values), costs(tune, objectives(tune, r))[0]), default=None
    )


@dataclass(frozen=True)
class Confirmed:
    """A trial that was trained again with new seeds."""

    number: int
    found: float
    """Its value in the search, which is too good on average: it was chosen for it."""
    values: list[float]
    """With the new seeds."""
    sign: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def mean_cost(self) -> float:
        return self.sign * self.mean

    @property
    def gap(self) -> float:
        """How much worse the new seeds are, on average."""
        return self.sign * (self.mean - self.found)


def confirmations(tune: Tune, records: Sequence[TrialRecord]) -> list[Confirmed]:
    """Trials with at least one finished repetition; a repetition that failed counts nothing."""
    sign = 1 if tune.modes[0] == "min" else -1
    repeated = [r for r in records if r.kind == "confirm" and r.state == "finished"]
    found = []
    for record in complete(records):
        same = [r for r in repeated if without_seed(r) == without_seed(record)]
        if same:
            values = [objectives(tune, r)[0] for r in same]
            found.append(Confirmed(record.number, objectives(tune, record)[0], values, sign))
    return found


def without_seed(record: TrialRecord) -> dict[str, object]:
    return {path: value for path, value in record.params.items() if path != SEED}


def commonest_error(records: Sequence[TrialRecord]) -> str:
    """Of failed trials: how many end in the same line, and one of them whole."""
    errors = [r.error for r in records if r.error]
    if not errors:
        return ""
    lasts = [e.strip().splitlines()[-1] for e in errors]
    line, count = Counter(lasts).most_common(1)[0]
    whole = errors[lasts.index(line)]
    return f"{count} of {len(errors)} failed with:\n{whole}"


def rung_correlations(curves: Mapping[int, Sequence[float]]) -> list[tuple[int, int, float, int]]:
    """Spearman's rank correlation of values at epochs 1, 3, 9, ... with those at the last epoch.

    Returns:
        (epoch, last epoch, correlation, trials that came to both), where at least three did.
    """
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    last = max((len(c) for c in curves.values()), default=0)
    found, epoch = [], 1
    whole = [c for c in curves.values() if len(c) == last and all(map(math.isfinite, c))]
    while epoch < last and len(whole) >= 3:
        early, late = [c[epoch - 1] for c in whole], [c[-1] for c in whole]
        if len(set(early)) > 1 and len(set(late)) > 1:
            value = float(spearmanr(early, late).statistic)
            found.append((epoch, last, value, len(whole)))
        epoch *= 3
    return found


def usable_priors(priors: Sequence[Prior]) -> tuple[list[Prior], list[Prior]]:
    """Those whose values count, and those whose settings only are tried."""
    return [p for p in priors if p.comparable], [p for p in priors if not p.comparable]
