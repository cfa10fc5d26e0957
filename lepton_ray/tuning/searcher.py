"""Optuna, asked so that each answer is a function of the seed, the trial's number and the history.

A sampler lives for one question, with a seed of its own. So a study that goes on from its journal
asks for the same trials as one that was never stopped.

Optuna is told the truth: a stopped trial is pruned, with its values per epoch; a crashed or
diverged one has failed; one beyond the constraints is not feasible.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from lepton_ray.config.schema import Tune
from lepton_ray.data.order import key
from lepton_ray.tuning.journal import Journal, Prior, Report, TrialRecord, TrialStart
from lepton_ray.tuning.results import excesses, objectives, usable_priors
from lepton_ray.tuning.space import contains, distribution, in_order, is_active

if TYPE_CHECKING:
    from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
    from optuna.samplers._tpe.probability_distributions import _MixtureOfProductDistribution

OPTUNA_STATE = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
TRIED_PRIORS = 3  # settings of a study whose values do not count here, that are tried first


class MultivariateTpe(optuna.samplers.TPESampler):
    """Optuna's TPE of all settings together, told the space, which it gathers from all trials at
    every question otherwise.

    Args:
        space: settings that every trial has; one that has a single value is left out by Optuna.
        options: of Optuna's sampler.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(multivariate=True, **options)
        self._known = {name: space[name] for name in sorted(space) if not space[name].single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self._known)


class Tpe(MultivariateTpe):
    """Optuna's TPE of one setting at a time, which sorts the trials once for all settings and not
    for each: half the time where there are a thousand.

    The candidates are those of all settings together; of each setting the best one is taken, as if
    the others did not exist. This rests on private names of Optuna 5.0, which is pinned; a test
    compares with what Optuna itself makes of one setting.
    """

    def _compute_acquisition_func(
        self,
        samples: dict[str, npt.NDArray[np.float64]],
        mpe_below: _ParzenEstimator,
        mpe_above: _ParzenEstimator,
    ) -> npt.NDArray[np.float64]:
        """Puts the best of each setting together as the first candidate, and prefers that."""
        good, bad = mpe_below._mixture_distribution, mpe_above._mixture_distribution
        for at, values in enumerate(samples.values()):
            alone = values[:, None]
            score = _of_one(good, at).log_pdf(alone) - _of_one(bad, at).log_pdf(alone)
            values[0] = values[np.argmax(score)]
        return -np.arange(len(values), dtype=np.float64)


def _of_one(all_settings: _MixtureOfProductDistribution, at: int) -> _MixtureOfProductDistribution:
    """The distribution of one setting, whatever the others are."""
    return all_settings._replace(distributions=[all_settings.distributions[at]])


class OptunaSearcher:
    """Proposes settings.

    Args:
        fixed: what the experiment says for settings that are not searched.
        own: settings of the first trial.
    """

    def __init__(
        self, tune: Tune, journal: Journal, fixed: Mapping[str, Any], own: Mapping[str, Any]
    ) -> None:
        self._tune = tune
        self._fixed = fixed
        self._order = in_order(tune.space)
        self._distributions = {p: distribution(w) for p, w in tune.space.items()}
        comparable, others = usable_priors(journal.priors)
        lacking = any(tune.space.keys() - _inside(tune, prior.params) for prior in comparable)
        self._always = {} if _conditional(tune) or lacking else self._distributions
        self._first = [own, *(_inside(tune, p.params) for p in others[:TRIED_PRIORS])]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [
            StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE
            for mode in tune.modes
        ]
        self._study = optuna.create_study(directions=directions)
        self._trials: dict[int, optuna.trial.Trial] = {}
        for prior in comparable:
            self._add_prior(prior)
        for number in sorted(journal.starts):
            self._add(journal.starts[number], journal.reports[number], journal.ended.get(number))

    @property
    def study(self) -> optuna.Study:
        """As Optuna's reports take it."""
        return self._study

    def propose(self, number: int) -> TrialStart:
        """Settings for a new trial; it counts as running from now on."""
        self._study.sampler = make_sampler(self._tune, number, self._always)
        if number < len(self._first) and self._first[number]:
            self._study.enqueue_trial(dict(self._first[number]), skip_if_exists=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that are enqueued and not active
            trial = self._study.ask()
            params: dict[str, Any] = {}
            for path in self._order:
                if is_active(self._tune.space[path], params, self._fixed):
                    params[path] = _suggest(trial, path, self._distributions[path])
        self._trials[number] = trial
        return TrialStart(number=number, params=params, attrs=_sampler_state(trial))

    def report(self, number: int, report: Report) -> None:
        """An epoch's value; of several metrics Optuna takes only the last ones."""
        trial = self._trials.get(number)
        if trial is not None and len(self._tune.metrics) == 1 and math.isfinite(report.value):
            trial.report(report.value, step=report.epoch)

    def tell(self, record: TrialRecord) -> None:
        """How a trial ended."""
        trial = self._trials.pop(record.number, None)
        if trial is None:
            return  # not of the search
        for name, excess in excesses(self._tune.constraints, record.metrics).items():
            trial.set_constraint(name, excess)
        self._study.sampler = make_sampler(self._tune, record.number, self._always)
        state, values = _outcome(self._tune, record)
        self._study.tell(trial, values, state=state)

    def _add_prior(self, prior: Prior) -> None:
        params = _inside(self._tune, prior.params)
        if not params:
            return
        single = len(self._tune.metrics) == 1
        self._study.add_trial(
            create_trial(
                params=params,
                distributions={p: self._distributions[p] for p in params},
                value=prior.value if single else None,
                intermediate_values=dict(enumerate(prior.values, 1)) if single else None,
                state=TrialState.COMPLETE if single else TrialState.FAIL,
            )
        )

    def _add(self, start: TrialStart, reports: Sequence[Report], end: TrialRecord | None) -> None:
        """A trial of an earlier process."""
        if start.kind == "confirm":
            return
        single = len(self._tune.metrics) == 1
        steps = {r.epoch: r.value for r in reports if math.isfinite(r.value)} if single else {}
        state, values = _outcome(self._tune, end) if end else (TrialState.RUNNING, None)
        attrs = dict(start.attrs)
        if end:
            for name, excess in excesses(self._tune.constraints, end.metrics).items():
                attrs[f"constraints:{name}"] = excess
        self._study.add_trial(
            create_trial(
                state=state,
                params=start.params,
                distributions={p: self._distributions[p] for p in start.params},
                values=values,
                intermediate_values=steps,
                system_attrs=attrs,
            )
        )
        if end is None:
            last = self._study.get_trials(deepcopy=False)[-1]
            self._trials[start.number] = optuna.trial.Trial(self._study, last._trial_id)


def make_sampler(
    tune: Tune, number: int, always: Mapping[str, BaseDistribution]
) -> optuna.samplers.BaseSampler:
    """The sampler that is asked for one trial.

    Args:
        always: the space, where all trials have all of it; else nothing.
    """
    seed = key(tune.seed, "trial", number) % 2**32
    startup = min(10, max(3, tune.trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features of Optuna, used knowingly
        match tune.searcher:
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "gp":
                return optuna.samplers.GPSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
        options: dict[str, Any] = {"seed": seed, "n_startup_trials": startup, "constant_liar": True}
        together = tune.searcher == "multivariate_tpe"
        if always:
            return (MultivariateTpe if together else Tpe)(always, **options)
        return optuna.samplers.TPESampler(
            **options, multivariate=together, group=together and _conditional(tune)
        )


def _conditional(tune: Tune) -> bool:
    """Whether some settings are searched in some trials only."""
    return any(where.when for where in tune.space.values())


def _outcome(tune: Tune, record: TrialRecord) -> tuple[TrialState, list[float] | None]:
    """What Optuna is told of an end: values only of trials that finished and measured them all."""
    if record.state != "finished":
        return OPTUNA_STATE[record.state], None
    values = objectives(tune, record)
    if not all(map(math.isfinite, values)):
        return TrialState.FAIL, None
    return TrialState.COMPLETE, values


def _inside(tune: Tune, params: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that are searched and lie in the space."""
    return {
        path: value
        for path, value in params.items()
        if path in tune.space and contains(tune.space[path], value)
    }


def _suggest(trial: optuna.trial.Trial, path: str, where: BaseDistribution) -> Any:
    if isinstance(where, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(path, where.choices)
    if isinstance(where, optuna.distributions.IntDistribution):
        return trial.suggest_int(path, where.low, where.high)
    assert isinstance(where, optuna.distributions.FloatDistribution)
    return trial.suggest_float(path, where.low, where.high, step=where.step, log=where.log)


def _sampler_state(trial: optuna.trial.Trial) -> dict[str, Any]:
    """What the sampler wrote to a trial: CMA-ES keeps its state there, in Optuna's own form."""
    attrs = trial.storage.get_trial_system_attrs(trial._trial_id)
    return {name: value for name, value in attrs.items() if name.startswith("cma:")}
