"""All decisions of a study, each written to the journal before anything follows from it.

No Ray, no process and no clock of its own: what is asked next, whether a trial goes on and when the
study is over are functions of the journal, the experiment and the time given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lepton_ray.config.schema import Experiment
from lepton_ray.errors import StudyError, nearest
from lepton_ray.tuning import population, results
from lepton_ray.tuning.journal import Journal, Prior, Report, TrialRecord, TrialStart
from lepton_ray.tuning.rules import make_rule
from lepton_ray.tuning.searcher import OptunaSearcher
from lepton_ray.tuning.space import grid, own_values, settings

HOPELESS = 10  # trials that all failed, after which no more are tried

Next = TrialStart | Literal["wait", "over"]


class Decisions:
    """What a study does next.

    Args:
        more: trials beyond ``tune.trials``.
        priors: of earlier studies, for a new journal.
        clock: seconds, of any origin.
        usd_per_hour: of the cluster as it is now.

    Raises:
        StudyError: when the journal is of a study that searched something else.
    """

    def __init__(
        self,
        experiment: Experiment,
        journal: Journal,
        *,
        more: int = 0,
        priors: Sequence[Prior] = (),
        clock: Callable[[], float] = time.monotonic,
        usd_per_hour: Callable[[], float] = lambda: 0.0,
    ) -> None:
        assert experiment.tune is not None
        self.tune = experiment.tune
        self.journal = journal
        self.epochs = longest(experiment)
        self._experiment = experiment
        self._clock = clock
        self._usd_per_hour = usd_per_hour
        self._began = self._priced = clock()
        self._usd = 0.0
        new = not journal.header
        journal.open(header(experiment))
        if new:
            for prior in priors:
                journal.add_prior(prior)
        self._more = more
        self._fixed = settings(experiment)
        own = own_values(experiment)
        self.rule = make_rule(self.tune, self.epochs)
        self._searcher: OptunaSearcher | None = None
        self._grid: list[dict[str, Any]] = []
        if self.tune.searcher == "grid":
            self._grid = list(grid(self.tune.space, self._fixed))
        elif self.tune.searcher == "pbt":
            self._first = population.first_generation(self.tune, own)
        else:
            self._searcher = OptunaSearcher(self.tune, journal, self._fixed, own)
        for number, report in journal.order:
            if journal.starts[number].kind == "search":
                cost = results.costs(self.tune, [report.value, *self._unknown])[0]
                self.rule.note(number, report.epoch, cost, bool(report.stop))
        for record in journal.finished:
            self._finish(record)
        self._again = sorted(journal.unfinished)
        self.reason = ""
        """Why no more trials start; empty while they do."""
        self._look_at_goal()

    # --- what is next --------------------------------------------------------------------------

    def next(self) -> Next:
        """The next trial: first those that were cut off, as they were."""
        self._look_at_budget()
        if self.reason:
            return "over"
        if self._again:
            return self.journal.starts[self._again.pop(0)]
        start = self._propose()
        if isinstance(start, TrialStart):
            self.journal.start(start)
        return start

    @property
    def target(self) -> int:
        """Trials of the search in all."""
        if self.tune.searcher == "pbt":
            return population.total(self.tune, self.epochs)
        count = self.tune.trials + self._more
        return min(count, len(self._grid)) if self.tune.searcher == "grid" else count

    @property
    def complete(self) -> bool:
        """Nothing is left to do: all is searched, confirmed and ended."""
        return not self.journal.unfinished and (
            bool(self.reason) or (self._searched >= self.target and not self._unconfirmed())
        )

    @property
    def _searched(self) -> int:
        return sum(start.kind != "confirm" for start in self.journal.starts.values())

    def _propose(self) -> Next:
        number, searched = len(self.journal.starts), self._searched
        if searched < self.target:
            if self.tune.searcher == "grid":
                return TrialStart(number=number, params=self._grid[searched])
            if self.tune.searcher == "pbt":
                return self._member(number)
            assert self._searcher is not None
            return self._searcher.propose(number)
        if self.tune.confirm is None:
            return "over"
        if any(s.kind != "confirm" for s in self.journal.unfinished.values()):
            return "wait"
        missing = self._unconfirmed()
        return TrialStart(number=number, params=missing[0], kind="confirm") if missing else "over"

    def _unconfirmed(self) -> list[dict[str, Any]]:
        """Settings, seed included, that are to be trained again and were not yet."""
        confirm = self.tune.confirm
        if confirm is None:
            return []
        own = self._experiment.train.seed
        given = [s.params for s in self.journal.starts.values() if s.kind == "confirm"]
        top = results.ranked(self.tune, self.journal.finished)[: confirm.top]
        wanted = [
            {**record.params, results.SEED: own + 1 + extra}
            for extra in range(confirm.seeds)
            for record in top
        ]
        return [params for params in wanted if params not in given]

    def _member(self, number: int) -> Next:
        size = self.tune.population.size
        generation, member = divmod(number, size)
        if generation == 0:
            return TrialStart(number=number, params=self._first[member], kind="member")
        numbers = range((generation - 1) * size, generation * size)
        if any(n not in self.journal.ended for n in numbers):
            return "wait"
        before = [self._as_member(self.journal.ended[n]) for n in numbers]
        if not any(math.isfinite(m.cost) for m in before):
            self.reason = "all of a generation failed"
            return "over"
        parent, params = population.next_generation(self.tune, before, generation)[member]
        return TrialStart(number=number, params=params, kind="member", parent=parent)

    def _as_member(self, record: TrialRecord) -> population.Member:
        failed = record.state != "finished"
        cost = results.costs(self.tune, results.objectives(self.tune, record))[0]
        return population.Member(record.number, record.params, math.inf if failed else cost)

    # --- what trials say -----------------------------------------------------------------------

    def report(self, number: int, epoch: int, metrics: Mapping[str, float], *, last: bool) -> str:
        """Whether a trial goes on after an epoch: "" or the reason to stop.

        What was decided before a restart is decided the same again.

        Args:
            last: it was the trial's last epoch.

        Raises:
            StudyError: when the metric is not among those reported.
        """
        known = self.journal.reports[number]
        first = known[0].epoch if known else epoch  # members of a population begin later
        if epoch - first < len(known):
            return known[epoch - first].stop
        name = self.tune.metrics[0]
        if name not in metrics:
            raise StudyError(
                f"tune.metric: {name!r} is never reported, {nearest(name, metrics)}: set "
                "tune.metric to one of these"
            )
        value = float(metrics[name])
        is_search = self.journal.starts[number].kind == "search"
        cost = results.costs(self.tune, [value, *self._unknown])[0]
        stop = ""
        if not math.isfinite(value):
            stop = f"{name} is {value}"
        elif not last:
            self._look_at_budget()
            stop = self.reason or (self.rule.judge(number, epoch, cost) if is_search else "")
        report = Report(epoch, value, stop)
        self.journal.report(number, report, self.spent)
        if is_search:
            self.rule.note(number, epoch, cost, bool(stop))
            if self._searcher is not None:
                self._searcher.report(number, report)
        return stop

    def end(
        self,
        number: int,
        *,
        finished: bool,
        metrics: Mapping[str, float],
        seconds: float = 0.0,
        error: str = "",
        weights_sha256: str = "",
        reason: str = "",
    ) -> TrialRecord:
        """A trial ended."""
        start = self.journal.starts[number]
        reports = self.journal.reports[number]
        values = [r.value for r in reports]
        reason = reason or (reports[-1].stop if reports else "")
        beyond = {
            name: excess
            for name, excess in results.excesses(self.tune.constraints, metrics).items()
            if excess > 0
        }
        if beyond and not reason:
            name = min(beyond)
            reason = f"{name} {metrics[name]:g} is beyond its constraint"
        broken = bool(error) or (bool(values) and not math.isfinite(values[-1]))
        if finished and not broken:
            missing = [m for m in self.tune.metrics if not math.isfinite(metrics.get(m, math.nan))]
            broken = bool(missing)
            error = f"{', '.join(missing)} was not measured" if missing else ""
        if not values and not finished and not reason:
            broken = True
        record = TrialRecord(
            number=number,
            params=start.params,
            state="failed" if broken else "finished" if finished else "pruned",
            values=values,
            metrics={k: float(v) for k, v in metrics.items()},
            seconds=round(seconds, 3),
            error=error or (reason if broken else ""),
            reason=reason,
            weights_sha256=weights_sha256,
            feasible=not beyond,
            kind=start.kind,
        )
        self.journal.finish(record, self.spent)
        if self._searcher is not None and start.kind == "search":
            self._searcher.tell(record)
        self._finish(record)
        self._look_at_goal()
        return record

    def _finish(self, record: TrialRecord) -> None:
        """Tell the rule of a trial that others may be held against."""
        if record.kind == "search" and results.complete([record]):
            values = results.objectives(self.tune, record)
            self.rule.finish(record.number, results.costs(self.tune, values)[0])

    # --- when it is over -----------------------------------------------------------------------

    @property
    def spent(self) -> tuple[float, float]:
        """Seconds and USD, of this process."""
        now = self._clock()
        if self.tune.budget is not None and self.tune.budget.usd is not None:
            self._usd += (now - self._priced) / 3600 * self._usd_per_hour()
        self._priced = now
        return round(now - self._began, 3), round(self._usd, 6)

    @property
    def left_s(self) -> float | None:
        """Seconds until a budget is spent, with the cluster as it is; None without one."""
        budget = self.tune.budget
        if budget is None:
            return None
        seconds, usd = self.spent
        lefts = []
        if budget.minutes is not None:
            lefts.append(budget.minutes * 60 - self.journal.seconds - seconds)
        if budget.usd is not None and (rate := self._usd_per_hour()) > 0:
            lefts.append((budget.usd - self.journal.usd - usd) / rate * 3600)
        return max(0.0, min(lefts)) if lefts else None

    def is_over(self) -> bool:
        """Whether running trials are to be stopped too."""
        self._look_at_budget()
        return bool(self.reason)

    def _look_at_budget(self) -> None:
        if not self.reason and self.left_s == 0.0:
            self.reason = "the budget is spent"

    def _look_at_goal(self) -> None:
        finished, tune = results.complete(self.journal.finished), self.tune
        ended = self.journal.finished
        if self.reason:
            return
        if len(ended) >= HOPELESS and all(r.state == "failed" for r in ended):
            self.reason = f"the first {len(ended)} trials failed"
        if tune.goal is None:
            return
        goal = results.costs(tune, [tune.goal, *self._unknown])[0]
        for record in finished:
            values = results.objectives(tune, record)
            if results.costs(tune, values)[0] <= goal:
                self.reason = f"the goal is reached by trial {record.id}"
                return

    @property
    def _unknown(self) -> list[float]:
        """In place of the values of further metrics."""
        return [math.nan] * (len(self.tune.metrics) - 1)


def longest(experiment: Experiment) -> int:
    """Epochs of the longest trial."""
    assert experiment.tune is not None
    searched = experiment.tune.space.get("train.epochs")
    return int(max(searched.corners)) if searched else experiment.train.epochs


def header(experiment: Experiment) -> dict[str, Any]:
    """What a study is about: of one journal it stays the same."""
    assert experiment.tune is not None
    tune = experiment.tune
    return {
        "space": {path: where.model_dump(mode="json") for path, where in tune.space.items()},
        "metric": list(tune.metrics),
        "mode": list(tune.modes),
        "searcher": tune.searcher,
        "scheduler": tune.rule,
        "seed": tune.seed,
    }
