"""Optuna as a searcher of Ray Tune, told the truth about how each trial ended.

Ray Tune's own adapter tells an early-stopped trial as complete and chokes on NaN. Here a stopped
trial is pruned, with its values per epoch; a crashed or diverged one has failed.
"""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from lepton_ray.config.schema import Tune
from lepton_ray.tuning.journal import Journal, TrialRecord

OPTUNA_STATE = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class OptunaSearcher(Searcher):
    """Asks Optuna for settings and tells it the outcomes; writes both to the journal.

    Args:
        first: settings of the first trial of a new study.
    """

    def __init__(
        self,
        tune: Tune,
        space: dict[str, BaseDistribution],
        journal: Journal,
        first: dict[str, Any],
    ) -> None:
        super().__init__(metric=tune.metric, mode=tune.mode)
        self._space = space
        self._journal = journal
        self._values: dict[str, list[float]] = {}
        self._running: dict[str, optuna.trial.Trial] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction = StudyDirection.MINIMIZE if tune.mode == "min" else StudyDirection.MAXIMIZE
        self._study = optuna.create_study(sampler=_sampler(tune), direction=direction)
        for record in journal.finished:
            self._add(record)
        # The journal keeps every start. One that was tried again since, by an earlier resume, has
        # its settings among the finished ones, or twice among the unfinished.
        tried = [record.params for record in journal.finished]
        for params in journal.unfinished.values():
            if params not in tried:
                tried.append(params)
                self._study.enqueue_trial(params)
        journal.unfinished.clear()
        if not journal.finished and first:
            self._study.enqueue_trial(first, skip_if_exists=True)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        trial = self._study.ask(self._space)
        self._running[trial_id] = trial
        self._values[trial_id] = []
        self._journal.start(trial_id, trial.params)
        return dict(trial.params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        value = float(result[self.metric])
        self._values[trial_id].append(value)
        if math.isfinite(value):
            self._running[trial_id].report(value, step=result["training_iteration"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        result = result or {}
        trial, values = self._running.pop(trial_id), self._values.pop(trial_id)
        if result.get("training_iteration", 0) > len(values):
            values.append(float(result[self.metric]))  # the last result comes only here
            if math.isfinite(values[-1]):
                trial.report(values[-1], step=result["training_iteration"])
        broken = error or not values or not math.isfinite(values[-1])
        finished = bool(result.get("finished"))
        record = TrialRecord(
            id=trial_id,
            params=dict(trial.params),
            state="failed" if broken else "finished" if finished else "pruned",
            values=values,
            metrics={k: float(v) for k, v in result.items() if k.startswith(("val_", "train_"))},
            seconds=float(result.get("time_total_s", 0.0)),
            error=str(result.get("error", "the trial's process died" if error else "")),
        )
        self._study.tell(
            trial,
            values[-1] if record.state == "finished" else None,
            state=OPTUNA_STATE[record.state],
        )
        self._journal.finish(record)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def _add(self, record: TrialRecord) -> None:
        """A trial of an earlier process."""
        steps = {e: v for e, v in enumerate(record.values, 1) if math.isfinite(v)}
        self._study.add_trial(
            create_trial(
                state=OPTUNA_STATE[record.state],
                params=record.params,
                distributions=self._space,
                value=record.values[-1] if record.state == "finished" else None,
                intermediate_values=steps,
            )
        )


def _sampler(tune: Tune) -> optuna.samplers.BaseSampler:
    if tune.searcher == "random":
        return optuna.samplers.RandomSampler(seed=tune.seed)
    return optuna.samplers.TPESampler(
        multivariate=True,
        constant_liar=True,
        seed=tune.seed,
        n_startup_trials=min(10, max(3, tune.trials // 3)),
    )
