"""A study as one HTML file that needs nothing beside it, and as PNG files."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

import optuna

from lepton_ray.config.schema import Experiment, Tune
from lepton_ray.tuning import plots, results
from lepton_ray.tuning.journal import Journal, TrialRecord
from lepton_ray.tuning.searcher import OptunaSearcher
from lepton_ray.tuning.space import settings
from lepton_ray.tuning.status import STATES, settings_text

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 0.3rem; }}
p.note {{ color: #555; margin: 0.2rem 0 0.6rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #e4e4e4;
  vertical-align: top; }}
th {{ border-bottom: 2px solid #bbb; }} td.n, th.n {{ text-align: right; }}
tr.best td {{ background: #eaf3fb; }} .wide {{ overflow-x: auto; }}
pre {{ white-space: pre-wrap; margin: 0; font-size: 12px; max-height: 9rem; overflow: auto; }}
</style></head><body>
{body}
</body></html>
"""


def write(experiment: Experiment, journal: Journal, folder: Path) -> list[Path]:
    """Write ``report.html`` and the PNG files; returns them, the HTML first."""
    tune = experiment.tune
    assert tune is not None
    folder.mkdir(parents=True, exist_ok=True)
    fixed = settings(experiment)
    study = OptunaSearcher(tune, journal, fixed, {}).study
    page = folder / "report.html"
    page.write_text(_page(experiment, tune, journal, study))
    return [page, *plots.pngs(tune, journal, study, folder)]


def _page(experiment: Experiment, tune: Tune, journal: Journal, study: optuna.Study) -> str:
    from plotly.offline import get_plotlyjs

    records = journal.finished
    best = results.best(tune, records)
    parts = [f"<script>{get_plotlyjs()}</script>", _head(experiment, tune, journal, best)]
    for title, note, figure in plots.figures(tune, journal, study):
        parts.append(f"<h2>{title}</h2><p class='note'>{note}</p>")
        parts.append(figure)
    confirmed = results.confirmations(tune, records)
    if confirmed:
        parts.append(_confirmed_table(tune, confirmed))
    parts.append(_trial_table(tune, records, best))
    return PAGE.format(title=html.escape(f"{experiment.name}: study"), body="\n".join(parts))


def _head(experiment: Experiment, tune: Tune, journal: Journal, best: TrialRecord | None) -> str:
    states = [r.state for r in journal.finished]
    seconds, usd = journal.spent
    facts = [
        f"{len(states)} trials: {states.count('finished')} finished, {states.count('pruned')} "
        f"stopped early, {states.count('failed')} failed",
        f"{seconds:.0f} s" + (f", ${usd:.2f}" if usd else ""),
        f"searcher {tune.searcher}, scheduler {tune.rule}, seed {tune.seed}",
        journal.closed,
    ]
    lines = [f"<h1>{html.escape(experiment.name)}: study</h1>"]
    lines.append(f"<p class='note'>{html.escape('; '.join(f for f in facts if f))}</p>")
    if best is not None:
        values = ", ".join(
            f"{m} {v:.5g}"
            for m, v in zip(tune.metrics, results.objectives(tune, best), strict=True)
        )
        what = f"Best: trial {best.id}, {values} with {settings_text(best.params)}"
        lines.append(f"<p><b>{html.escape(what)}</b></p>")
    return "\n".join(lines)


def _confirmed_table(tune: Tune, confirmed: Sequence[results.Confirmed]) -> str:
    rows = [
        f"<tr><td>{c.number:04d}</td><td class='n'>{c.found:.5g}</td>"
        f"<td class='n'>{c.mean:.5g}</td><td class='n'>{c.gap:+.5g}</td>"
        f"<td>{', '.join(f'{v:.5g}' for v in c.values)}</td></tr>"
        for c in confirmed
    ]
    return (
        "<h2>Best trials again, with new seeds</h2><p class='note'>A best value is too good on "
        "average: it was chosen for being the best. The gap says by how much.</p>"
        f"<table><tr><th>trial</th><th class='n'>{html.escape(tune.metrics[0])} in the search</th>"
        "<th class='n'>mean of new seeds</th><th class='n'>gap</th><th>each</th></tr>"
        + "".join(rows)
        + "</table>"
    )


def _trial_table(tune: Tune, records: Sequence[TrialRecord], best: TrialRecord | None) -> str:
    heads = "".join(f"<th class='n'>{html.escape(m)}</th>" for m in tune.metrics)
    rows = []
    for record in sorted(records, key=lambda r: r.number):
        values = "".join(
            f"<td class='n'>{'-' if math.isnan(v) else f'{v:.5g}'}</td>"
            for v in results.objectives(tune, record)
        )
        said = html.escape(record.reason or ("again" if record.kind == "confirm" else ""))
        if record.error:
            said = f"<pre>{html.escape(record.error)}</pre>"
        mark = " class='best'" if best is not None and record.number == best.number else ""
        rows.append(
            f"<tr{mark}><td>{record.id}</td><td>{STATES[record.state]}</td>"
            f"<td class='n'>{len(record.values)}</td>{values}"
            f"<td class='n'>{record.seconds:.1f}</td>"
            f"<td>{html.escape(settings_text(record.params))}</td><td>{said}</td></tr>"
        )
    return (
        "<h2>Trials</h2><div class='wide'><table><tr><th>trial</th><th>state</th>"
        f"<th class='n'>epochs</th>{heads}<th class='n'>seconds</th><th>settings</th><th></th></tr>"
        + "".join(rows)
        + "</table></div>"
    )
