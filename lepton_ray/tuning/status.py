"""How a study stands, from its journal alone: for its own terminal, and for any other."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from lepton_ray.config.schema import Tune
from lepton_ray.tuning import results
from lepton_ray.tuning.journal import FILE, Journal, TrialRecord

SHOWN = 12  # trials in the table: all that run, then the best
STATES = {"finished": "finished", "pruned": "stopped", "failed": "failed"}


def exists(folder: Path) -> bool:
    """Whether a study has begun in the folder."""
    return (folder / FILE).exists()


def state(tune: Tune, journal: Journal, *, target: int | None = None) -> dict[str, Any]:
    """The study as plain values.

    Args:
        target: trials of the search in all; default ``tune.trials``.
    """
    best = results.best(tune, journal.finished)
    counts = {s: sum(r.state == s for r in journal.finished) for s in STATES}
    return {
        "trials": target or tune.trials,
        "ended": len(journal.finished),
        "running": len(journal.unfinished),
        **counts,
        "closed": journal.closed,
        "seconds": journal.spent[0],
        "usd": journal.spent[1],
        "metric": tune.metrics[0],
        "best": None
        if best is None
        else {
            "trial": best.id,
            "params": best.params,
            "values": results.objectives(tune, best),
        },
        "table": [_row(tune, journal, number) for number in _shown(tune, journal)],
        "quiet_s": round(journal.age_s, 1),
    }


def lines(tune: Tune, journal: Journal, *, target: int | None = None) -> list[str]:
    """The same for a person: a line of progress, then a table."""
    found = state(tune, journal, target=target)
    best = found["best"]
    shown = f", best {found['metric']} {best['values'][0]:.4f}" if best else ""
    seconds, usd = found["seconds"], found["usd"]
    head = (
        f"tune   {found['ended']} of {found['trials']} trials done, {found['running']} running"
        f"{shown}{_budget(tune, seconds, usd)}"
    )
    table = [f"       {'trial':>6} {'state':9} {'epoch':>5} {found['metric']:>12} {'seconds':>8}"]
    for row in found["table"]:
        value = "-" if math.isnan(row["value"]) else f"{row['value']:.4f}"
        table.append(
            f"       {row['trial']:>6} {row['state']:9} {row['epoch']:>5} {value:>12} "
            f"{row['seconds']:>8.1f}  {row['settings']}"
        )
    return [head, *table] if found["table"] else [head]


def settings_text(params: dict[str, Any]) -> str:
    """``train.optimizer.lr=0.003, model.width=16``."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}"
        for path, value in params.items()
    )


def _budget(tune: Tune, seconds: float, usd: float) -> str:
    if tune.budget is None:
        return ""
    parts = []
    if tune.budget.minutes is not None:
        left = max(0.0, tune.budget.minutes * 60 - seconds)
        parts.append(f"{left:.0f} s left")
    if tune.budget.usd is not None:
        parts.append(f"${usd:.2f} of ${tune.budget.usd:.2f} spent")
    return "; " + ", ".join(parts)


def _shown(tune: Tune, journal: Journal) -> list[int]:
    running = sorted(journal.unfinished)
    best = [r.number for r in results.ranked(tune, journal.finished)]
    others = [r.number for r in reversed(journal.finished) if r.number not in set(best)]
    return [*running, *best, *others][:SHOWN]


def _row(tune: Tune, journal: Journal, number: int) -> dict[str, Any]:
    record: TrialRecord | None = journal.ended.get(number)
    reports, start = journal.reports[number], journal.starts[number]
    value = reports[-1].value if reports else math.nan
    if record is not None:
        value = results.objectives(tune, record)[0]
    return {
        "trial": start.id,
        "state": "running" if record is None else STATES[record.state],
        "epoch": reports[-1].epoch if reports else 0,
        "value": value,
        "seconds": max(0.0, time.time() - start.at) if record is None else record.seconds,
        "settings": settings_text(start.params),
    }
