"""The plots of a study: interactive ones as HTML, and PNG files."""

from __future__ import annotations

import html
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from lepton_ray.config.schema import Tune
from lepton_ray.tuning import results
from lepton_ray.tuning.journal import Journal
from lepton_ray.tuning.status import STATES, settings_text

logger = logging.getLogger(__name__)

COLOURS = {"finished": "#1f77b4", "pruned": "#b0b0b0", "failed": "#d62728"}


def figures(tune: Tune, journal: Journal, study: optuna.Study) -> list[tuple[str, str, str]]:
    """(title, note, HTML) of each plot; where there is too little for one, the reason instead."""
    from optuna import visualization

    metric = html.escape(tune.metrics[0])
    first: Callable[[Any], float] | None = None
    if len(tune.metrics) > 1:

        def first(trial: optuna.trial.FrozenTrial) -> float:
            return float(trial.values[0])

    named: dict[str, Any] = {"target": first, "target_name": tune.metrics[0]}
    plots: list[tuple[str, str, Callable[[], Any]]] = [
        (
            "History",
            f"{metric} of each finished trial, in the order they began, and the best so far.",
            lambda: visualization.plot_optimization_history(study, **named),
        ),
        (
            "Learning curves",
            "Each trial's values; grey ones were stopped early, at the cross.",
            lambda: _curves(tune, journal),
        ),
        (
            "Settings together",
            "Each line is a finished trial.",
            lambda: visualization.plot_parallel_coordinate(study, **named),
        ),
        (
            "Importance of settings",
            "How much each setting alone tells the best trials from the others (PED-ANOVA).",
            lambda: visualization.plot_param_importances(study, **named),
        ),
        (
            "What early values say",
            "Spearman's rank correlation of values at early epochs with those at the last, over "
            "trials that came so far: near 1, stopping early costs nothing; near 0, it is a guess. "
            "Only trials that were good early came so far, which makes it smaller than it is.",
            lambda: _correlations(journal),
        ),
        (
            "Budget used",
            "Seconds and epochs of trials by how they ended.",
            lambda: _budget(journal),
        ),
    ]
    if len(tune.metrics) > 1:
        plots.insert(
            0,
            (
                "Pareto front",
                "Trials that none beats in all metrics are red.",
                lambda: visualization.plot_pareto_front(study, target_names=list(tune.metrics)),
            ),
        )
    return [(title, note, _draw(make)) for title, note, make in plots]


def _draw(make: Callable[[], Any]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = make()
        if figure is None or not figure.data:
            raise ValueError("no trial has values for it")
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        return f"<p>Not enough trials for this plot: {html.escape(str(error).splitlines()[0])}</p>"
    figure.update_layout(
        title=None,
        template="plotly_white",
        height=420,
        margin={"l": 70, "r": 30, "t": 30, "b": 60},
        font={"size": 13},
    )
    drawn: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False}
    )
    return f"<div class='wide'>{drawn}</div>"


def _curves(tune: Tune, journal: Journal) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    shown: set[str] = set()
    order = {"pruned": 0, "failed": 1, "finished": 2}
    for record in sorted(journal.finished, key=lambda r: order[r.state]):
        epochs = [r.epoch for r in journal.reports[record.number]]
        figure.add_scatter(
            x=epochs,
            y=record.values,
            mode="lines+markers",
            line={"color": COLOURS[record.state], "width": 1.5},
            marker={
                "size": [
                    9 if e == epochs[-1] and record.state != "finished" else 4 for e in epochs
                ],
                "symbol": [
                    "x" if e == epochs[-1] and record.state != "finished" else "circle"
                    for e in epochs
                ],
            },
            name=STATES[record.state],
            legendgroup=record.state,
            showlegend=record.state not in shown,
            hovertext=f"trial {record.id}: {settings_text(record.params)}",
        )
        shown.add(record.state)
    figure.update_layout(
        xaxis_title="epoch",
        yaxis_title=tune.metrics[0],
        yaxis={"type": "log", "dtick": 1} if _is_wide(journal) else {},
        xaxis={"rangemode": "tozero", "dtick": 1 if _last_epoch(journal) <= 20 else None},
    )
    return figure


def _is_wide(journal: Journal) -> bool:
    """Whether values only show on a logarithmic axis."""
    values = [v for r in journal.finished for v in r.values if math.isfinite(v)]
    return bool(values) and 0 < 20 * min(values) < max(values)


def _last_epoch(journal: Journal) -> int:
    return max((r.epoch for reports in journal.reports.values() for r in reports), default=1)


def _correlations(journal: Journal) -> Any:
    import plotly.graph_objects as go

    found = _found_correlations(journal)
    if not found:
        raise ValueError("fewer than three came to the last epoch")
    figure = go.Figure(
        go.Bar(
            x=[f"epoch {early} with {late}" for early, late, _, _ in found],
            y=[value for _, _, value, _ in found],
            text=[f"{value:.2f} ({count} trials)" for _, _, value, count in found],
            marker={"color": COLOURS["finished"]},
            width=0.4,
        )
    )
    figure.update_layout(yaxis={"range": [-1.05, 1.05]}, yaxis_title="rank correlation")
    return figure


def _found_correlations(journal: Journal) -> list[tuple[int, int, float, int]]:
    curves = {r.number: r.values for r in journal.finished if r.kind == "search" and r.values}
    return results.rung_correlations(curves)


def _budget(journal: Journal) -> Any:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=("seconds", "epochs"))
    for state, colour in COLOURS.items():
        of = [r for r in journal.finished if r.state == state]
        for column, used in ((1, sum(r.seconds for r in of)), (2, sum(len(r.values) for r in of))):
            figure.add_trace(
                go.Bar(
                    x=[STATES[state]],
                    y=[used],
                    text=[f"{used:.4g} ({len(of)} trials)"],
                    marker={"color": colour},
                    showlegend=False,
                ),
                row=1,
                col=column,
            )
    return figure


def pngs(tune: Tune, journal: Journal, study: optuna.Study, folder: Path) -> list[Path]:
    """The plots that a report or a README takes; those with too few trials are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as visualization

    several = len(tune.metrics) > 1
    named: dict[str, Any] = {
        "target": (lambda trial: trial.values[0]) if several else None,
        "target_name": tune.metrics[0],
    }
    plots: dict[str, Callable[[], Any]] = {
        "history": lambda: visualization.plot_optimization_history(study, **named),
        "parallel": lambda: visualization.plot_parallel_coordinate(study, **named),
        "importances": lambda: visualization.plot_param_importances(study, **named),
        "curves": lambda: _png_curves(tune, journal),
    }
    if several:
        plots["front"] = lambda: visualization.plot_pareto_front(
            study, target_names=list(tune.metrics)
        )
    written = []
    for name, make in plots.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                axes = make()
            figure = axes.figure if hasattr(axes, "figure") else axes[0].figure
            figure.set_size_inches(9, 5)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            written.append(folder / f"{name}.png")
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            logger.info("no %s.png: %s", name, error)
        finally:
            pyplot.close("all")
    return written


def _png_curves(tune: Tune, journal: Journal) -> Any:
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    _, axes = pyplot.subplots()
    for record in journal.finished:
        epochs = [r.epoch for r in journal.reports[record.number]]
        colour = COLOURS[record.state]
        axes.plot(
            epochs, record.values, color=colour, lw=1.2, zorder=2 + (record.state == "finished")
        )
        if record.state != "finished" and epochs:
            axes.plot(epochs[-1], record.values[-1], "x", color=colour)
    if _is_wide(journal):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(tune.metrics[0])
    axes.grid(alpha=0.3)
    return axes
