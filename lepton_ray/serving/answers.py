"""What a version answers with, by what its schema says: one form each for classes, labels, numbers,
rankings and forecasts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from lepton_ray.data.decision import AnyDecision
from lepton_ray.data.schema import Schema

Floats = npt.NDArray[np.floating]


class Answer(BaseModel):
    """The prediction for one row."""

    label: str
    probabilities: dict[str, float]


class LabelsAnswer(BaseModel):
    """The prediction for one row that may have several labels."""

    labels: list[str]
    """In the order of the model; none may be."""
    probabilities: dict[str, float]
    """Of having each label."""


class Value(BaseModel):
    """The prediction for one row of a regression."""

    value: float


class Ranking(BaseModel):
    """The items for one row, the best first."""

    items: list[str]
    scores: list[float]


class Forecast(BaseModel):
    """The values that follow one row's history."""

    values: list[float]


AnyAnswer = Answer | LabelsAnswer | Value | Ranking | Forecast


class Response(BaseModel):
    """What ``POST /predict`` answers."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    version: int
    predictions: list[Answer]


class LabelsResponse(Response):
    """What ``POST /predict`` answers for several labels a row."""

    predictions: list[LabelsAnswer]  # type: ignore[assignment]


class ValueResponse(Response):
    """What ``POST /predict`` answers for a regression."""

    predictions: list[Value]  # type: ignore[assignment]


class RankingResponse(Response):
    """What ``POST /predict`` answers for a ranking."""

    predictions: list[Ranking]  # type: ignore[assignment]


class ForecastResponse(Response):
    """What ``POST /predict`` answers for a forecast."""

    predictions: list[Forecast]  # type: ignore[assignment]


@dataclass(frozen=True)
class Output:
    """One tensor of an answer, in the words of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Behind the rows; -1 for a number that the request sets."""
    values: Callable[[Floats, Sequence[Any]], Any]
    """(what was found [n, outputs], the same as answers) -> [n, *shape]"""
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class Form:
    response: type[Response]
    answers: Callable[[Floats, AnyDecision, int | None], list[Any]]
    """(what was found [n, outputs], how to choose classes, how many to list) -> an answer each"""
    outputs: tuple[Output, ...]
    top_k: str
    """What a request may limit the number of; empty for nothing."""


def form_of(schema: Schema) -> Form:
    """How the versions with this schema answer."""
    return _FORMS[schema.task](schema)


def _classes(schema: Schema) -> Form:
    classes = schema.classes

    def answers(found: Floats, decision: AnyDecision, top_k: int | None) -> list[Answer]:
        chosen = decision.chosen(found).tolist()
        return [
            Answer(label=classes[best], probabilities=_listed(classes, row, top_k))
            for best, row in zip(chosen, found.tolist(), strict=True)
        ]

    label = Output("label", "BYTES", (), lambda _, given: _texts([a.label for a in given]))
    return Form(Response, answers, (label, _probabilities(classes)), "classes")


def _labels(schema: Schema) -> Form:
    classes = schema.classes

    def answers(found: Floats, decision: AnyDecision, top_k: int | None) -> list[LabelsAnswer]:
        chosen = decision.chosen(found).tolist()
        return [
            LabelsAnswer(
                labels=[name for name, has in zip(classes, own, strict=True) if has],
                probabilities=_listed(classes, row, top_k),
            )
            for own, row in zip(chosen, found.tolist(), strict=True)
        ]

    # A tensor's rows have one length, so that it says of each label whether it is there.
    has = Output(
        "labels",
        "BOOL",
        (len(classes),),
        lambda _, given: np.array(
            [[name in a.labels for name in classes] for a in given], np.bool_
        ).reshape(-1, len(classes)),
        {"classes": json.dumps(classes)},
    )
    return Form(LabelsResponse, answers, (has, _probabilities(classes)), "classes")


def _listed(classes: Sequence[str], row: list[float], top_k: int | None) -> dict[str, float]:
    """Probabilities by name; the highest ones in their order where not all are wanted."""
    ranked = list(zip(classes, row, strict=True))
    if top_k is not None:
        ranked = sorted(ranked, key=lambda item: -item[1])[:top_k]
    return dict(ranked)


def _probabilities(classes: Sequence[str]) -> Output:
    # A parameter is a string, a number or a boolean in this protocol, so the classes, in the order
    # of their probabilities, are a string of JSON.
    return Output(
        "probabilities",
        "FP32",
        (len(classes),),
        lambda found, _: found.astype(np.float32),
        {"classes": json.dumps(classes)},
    )


def _value(schema: Schema) -> Form:
    def answers(found: Floats, decision: AnyDecision, top_k: int | None) -> list[Value]:
        return [Value(value=value) for (value,) in found.tolist()]

    value = Output("value", "FP64", (), lambda found, _: found[:, 0].astype(np.float64))
    return Form(ValueResponse, answers, (value,), "")


def _ranking(schema: Schema) -> Form:
    def answers(found: Floats, decision: AnyDecision, top_k: int | None) -> list[Ranking]:
        count = min(schema.top_k if top_k is None else top_k, len(schema.items))
        # Equal scores in the order of the items; minus infinity marks what a user has had.
        best = np.argsort(-found, axis=1, kind="stable")[:, :count]
        return [
            Ranking(
                items=[schema.items[i] for i in row if scores[i] > -np.inf],
                scores=[float(scores[i]) for i in row if scores[i] > -np.inf],
            )
            for row, scores in zip(best, found, strict=True)
        ]

    def even(given: Sequence[Ranking]) -> int:
        """A tensor's rows have one length: that of the shortest."""
        return min((len(a.items) for a in given), default=0)

    items = Output(
        "items", "BYTES", (-1,), lambda _, given: _texts([a.items[: even(given)] for a in given])
    )
    scores = Output(
        "scores",
        "FP32",
        (-1,),
        lambda _, given: np.array([a.scores[: even(given)] for a in given], np.float32),
    )
    return Form(RankingResponse, answers, (items, scores), "items")


def _forecast(schema: Schema) -> Form:
    def answers(found: Floats, decision: AnyDecision, top_k: int | None) -> list[Forecast]:
        return [Forecast(values=values) for values in found.tolist()]

    values = Output("values", "FP64", (schema.horizon,), lambda found, _: found.astype(np.float64))
    return Form(ForecastResponse, answers, (values,), "")


def _texts(values: list[Any]) -> npt.NDArray[np.object_]:
    """[n] or [n, ...] texts as objects."""
    return np.array(values, np.str_).astype(object)


_FORMS: dict[str, Callable[[Schema], Form]] = {
    "classification": _classes,
    "multilabel": _labels,
    "regression": _value,
    "ranking": _ranking,
    "forecast": _forecast,
}
