"""The study of a run: go on with one, extend one, learn from one, and report what was found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from lepton_ray.config import schema as config
from lepton_ray.data.dataset import Dataset
from lepton_ray.errors import InputError
from lepton_ray.jobs import prices
from lepton_ray.jobs.metrics import RunMetrics
from lepton_ray.jobs.runs import RunFolder, differences
from lepton_ray.jobs.studies import JOURNAL, STUDY, StudyWatcher
from lepton_ray.jobs.watchers import to_all
from lepton_ray.pipeline import past
from lepton_ray.serving.latency import latency_ms
from lepton_ray.terminal import Terminal
from lepton_ray.tracking.store import Tracker
from lepton_ray.tuning import report, results, study
from lepton_ray.tuning.journal import TrialRecord
from lepton_ray.tuning.status import settings_text
from lepton_ray.tuning.trial import Measure

MEASURES: dict[str, Measure] = {"latency_ms": latency_ms}
PRICE_S = 30.0  # between two looks at the cluster's nodes
MAY_CHANGE = (
    "tune.trials",
    "tune.parallel",
    "tune.workers",
    "tune.budget",
    "tune.goal",
    "tune.confirm",
    "tune.keep",
)
"""Settings of a study that may be others when it is extended."""


def extend(experiment: config.Experiment, command: str, trials: int) -> RunFolder:
    """The last study of an experiment, opened again for more trials.

    Raises:
        InputError: when there is none, it has not finished, or it searched something else.
    """
    if experiment.tune is not None and experiment.tune.searcher == "pbt":
        raise InputError(
            "a population has as many trials as train.epochs and tune.population say: set those, "
            "and leave --add-trials out"
        )
    found = [
        f
        for f in RunFolder.all_of(experiment.storage, experiment.name)
        if f.command == command and (f.stage("tune") or f.recall("more_trials"))
    ]
    if not found:
        raise InputError(
            f"no finished study of {experiment.name!r} in {experiment.storage}: run "
            f"`lepton-ray {command}` without --add-trials first"
        )
    last = found[-1]
    changed = [
        d
        for d in differences(experiment, last.experiment())
        if not d.startswith((*MAY_CHANGE, "gate.", "serve."))
    ]
    if changed:
        raise InputError(
            f"the study in {last.uri} searched something else ({'; '.join(changed)}): extend it "
            "with the same file, or start a new one with --from-study, which learns from it"
        )
    last.settle()
    last.remember("more_trials", (last.recall("more_trials") or 0) + trials)
    last.reopen_stage("tune")
    return last


def search(
    experiment: config.Experiment,
    reference: ray.ObjectRef[Dataset],
    *,
    folder: RunFolder,
    tracker: Tracker,
    terminal: Terminal,
    tags: dict[str, str],
    from_study: str | None = None,
) -> dict[str, Any]:
    """Run the study, record and report it; what later stages take from it."""
    tune = experiment.tune
    assert tune is not None
    more = folder.recall("more_trials") or 0
    rate = _Rate(tune)
    priors = past.priors(experiment, from_study, tags["lepton_ray.data_digest"])
    if from_study:
        terminal.say(f"tune   {past.describe(priors, from_study)}")
    with folder.mirrored(JOURNAL):
        target = tune.trials + more
        watcher = StudyWatcher(experiment, tracker, folder, terminal, tags, target=target)
        start = time.monotonic()
        try:
            found = study.run(
                experiment,
                reference,
                folder=folder.path / STUDY,
                checkpoints=f"{folder.uri}/{STUDY}/checkpoints",
                more=more,
                priors=priors,
                usd_per_hour=rate,
                measures={name: m for name, m in MEASURES.items() if name in _measured(tune)},
                on_event=to_all(watcher, RunMetrics(experiment.name, folder.id)),
            )
        except BaseException as error:
            watcher.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        watcher.close("FINISHED", found.best)
    files = report.write(experiment, found.journal, folder.path / STUDY / "report")
    tracker.files(watcher.run_id, files[0].parent, "report")
    terminal.say(_summary(tune, found, time.monotonic() - start, files[0]))
    records = found.journal.finished
    states = [r.state for r in records]
    return {
        "best": asdict(found.best),
        "checkpoint": found.checkpoint,
        "trials": len(states),
        "study": watcher.run_id,
        "states": {s: states.count(s) for s in ("finished", "pruned", "failed")},
        "front": [asdict(r) for r in results.front(tune, records)] if _several(tune) else [],
        "confirmed": [asdict(c) for c in results.confirmations(tune, records)],
        "reason": found.reason,
        "report": str(files[0]),
        "waited_for_mlflow_s": round(watcher.waited_s, 3),
    }


class _Rate:
    """USD per hour of the nodes that are there; looked up now and then.

    Raises:
        ClusterError: when it is made, for a node whose price is not known.
    """

    def __init__(self, tune: config.Tune) -> None:
        self._budget = tune.budget
        self._looked_at = -PRICE_S
        self._value = 0.0
        self()

    def __call__(self) -> float:
        now = time.monotonic()
        if self._budget is None or self._budget.usd is None or now - self._looked_at < PRICE_S:
            return self._value
        self._looked_at = now
        labels = [node["Labels"] for node in ray.nodes() if node["Alive"]]
        self._value = prices.of_nodes(labels, self._budget.usd_per_hour)
        return self._value


def _measured(tune: config.Tune) -> set[str]:
    return {*tune.metrics, *tune.constraints}


def _several(tune: config.Tune) -> bool:
    return len(tune.metrics) > 1


def _summary(tune: config.Tune, found: study.Result, seconds: float, report_file: Path) -> str:
    records, best = found.journal.finished, found.best
    states = [r.state for r in records]
    values = results.objectives(tune, best)
    shown = ", ".join(f"{m} {v:.4f}" for m, v in zip(tune.metrics, values, strict=True))
    lines = [
        f"tune   best of {len(states)} trials: {shown} with {settings_text(best.params)}",
        f"       {states.count('finished')} finished, {states.count('pruned')} stopped early, "
        f"{states.count('failed')} failed; {seconds:.0f} s"
        + (f"; {found.reason}" if found.reason else ""),
    ]
    if _several(tune):
        lines += [f"       {line}" for line in _front_lines(tune, records)]
    for c in results.confirmations(tune, records):
        lines.append(
            f"       trial {c.number:04d} again with {len(c.values)} other seeds: "
            f"{tune.metrics[0]} {c.mean:.4f} on average, {c.found:.4f} in the search "
            f"(gap {c.gap:+.4f})"
        )
    if best.state != "finished":
        lines.append(
            f"       no trial finished: this one came furthest, to epoch {len(best.values)}"
        )
    usd = found.journal.spent[1]
    if usd:
        lines.append(f"       ${usd:.2f} spent")
    return "\n".join([*lines, f"       report {report_file}"])


def _front_lines(tune: config.Tune, records: Sequence[TrialRecord]) -> list[str]:
    front = results.front(tune, records)
    return [
        f"front {r.id}: "
        + ", ".join(
            f"{m} {v:.4g}" for m, v in zip(tune.metrics, results.objectives(tune, r), strict=True)
        )
        + f" with {settings_text(r.params)}"
        for r in front
    ]
