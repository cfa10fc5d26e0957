"""Explanations of a version's answers, from its files alone."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from lepton_ray.data.decision import AnyDecision, LabelDecision
from lepton_ray.data.preprocess import Preprocess
from lepton_ray.data.schema import Schema
from lepton_ray.errors import InputError
from lepton_ray.serving import manifest as manifests
from lepton_ray.serving.explain import BASELINE, heatmap, sample
from lepton_ray.serving.explain.answers import Completeness, Explanation, Part, check
from lepton_ray.serving.explain.methods import explain
from lepton_ray.serving.explain.sample import Sample
from lepton_ray.serving.requests import ENDLESS, Problem, RowsError
from lepton_ray.serving.runtime import read_decision

PATCHES = 8  # along each side of an image, for methods without gradients


class Explainer:
    """Of one version. Make one with `load`."""

    def __init__(
        self,
        program: torch.fx.GraphModule,
        preprocess: Preprocess,
        schema: Schema,
        decision: AnyDecision,
        baseline: Tensor | None,
    ) -> None:
        self._program = program
        self._preprocess = preprocess
        self.schema = schema
        self._decision = decision
        self._baseline = baseline

    @staticmethod
    def load(folder: Path) -> Explainer:
        """Open a version's folder after checking every file's SHA-256.

        Raises:
            ModelError: for a newer format or changed files.
            InputError: for a model of interactions or series.
        """
        manifests.verify(folder)
        schema = Schema.from_json(json.loads((folder / "schema.json").read_text()))
        check(schema, None, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(folder / "model.pt2").module()
        assert isinstance(program, torch.fx.GraphModule)
        program.requires_grad_(False)
        baseline = None
        if (folder / BASELINE).exists():
            baseline = torch.from_numpy(load_file(folder / BASELINE)["mean"])
        decided = read_decision(folder, schema)
        return Explainer(program, Preprocess.load(folder), schema, decided, baseline)

    def explain(
        self, columns: Mapping[str, Any], method: str | None = None, target: str | None = None
    ) -> list[Explanation]:
        """An explanation of each row.

        Args:
            columns: column name -> values [n, ...], already checked.
            method: one of `answers.METHODS`; default integrated gradients where the model has
                gradients by part, else Kernel SHAP.
            target: a class; default what each row is answered, of labels the likeliest.

        Raises:
            InputError: for an unknown class or method, or one that the model does not allow.
            RowsError: for a row that has no finite answer.
        """
        check(self.schema, method, target)
        x = torch.from_numpy(self._preprocess.apply(columns))
        rows = []
        for number in range(len(x)):
            row = {name: values[number] for name, values in columns.items()}
            try:
                rows.append(self._row(x[number], row, method, target))
            except OverflowError:
                raise RowsError([Problem(number, "", ENDLESS, "nan")]) from None
        return rows

    def _row(
        self, x: Tensor, row: Mapping[str, Any], method: str | None, target: str | None
    ) -> Explanation:
        kind = self.schema.columns[0].kind
        of = self._image(x) if kind == "image" else self._words(x, row)
        of = of or self._table(x)
        if method is None:
            method = "integrated_gradients" if of.smooth is not None else "kernel_shap"
        elif method == "integrated_gradients" and of.smooth is None:
            raise InputError(
                "integrated_gradients needs a model that looks up each word's vector, but this one "
                "has no gradients by word: ask for kernel_shap, lime or occlusion"
            )
        index = self._target(of, target)
        found = explain(of, method, self._answer, index)
        numbers = found.values.tolist()
        return Explanation(
            target=self.schema.classes[index] if self.schema.classes else self.schema.target,
            answer=found.full,
            baseline=self._baseline_name(kind),
            baseline_answer=found.empty,
            method=method,
            evaluations=found.evaluations,
            completeness=Completeness(
                difference=found.full - found.empty, error=found.error, holds=found.complete
            ),
            **self._form(kind, numbers, row),
        )

    def _target(self, of: Sample, target: str | None) -> int:
        if not self.schema.classes:
            return 0
        if target is not None:
            return self.schema.classes.index(target)
        with torch.no_grad():
            found = self._answer(of.rough(torch.ones(1, of.parts))).numpy()
        if isinstance(self._decision, LabelDecision):
            return int(found[0].argmax())
        return int(self._decision.chosen(found)[0])

    def _answer(self, outputs: Tensor) -> Tensor:
        """Probabilities, or values in the target's unit."""
        if isinstance(self._decision, LabelDecision):
            scale, shift = (torch.tensor(of) for of in (self._decision.scale, self._decision.shift))
            return torch.sigmoid(outputs * scale + shift)
        if self.schema.classes:
            shift = torch.zeros(outputs.shape[1])
            shift[1] = self._decision.shift
            return torch.softmax(outputs * self._decision.scale + shift, 1)
        fitted = self._preprocess
        values = outputs * fitted.target_deviation + fitted.target_mean
        return values.sign() * values.abs().expm1() if fitted.target_log else values

    def _image(self, x: Tensor) -> Sample:
        column = self.schema.columns[0]
        black = np.full((1, *column.shape), column.low or 0.0, np.float32)
        baseline = torch.from_numpy(self._preprocess.apply({column.name: black}))[0]
        _, height, width = x.shape
        pixels = torch.arange(height * width).reshape(height, width).expand(x.shape)
        rows, across = (_patch(size)[:, None] for size in (height, width))
        groups = rows * (int(across.max()) + 1) + across.T
        return sample.of_numbers(self._program, x, baseline, pixels, groups.flatten())

    def _words(self, x: Tensor, row: Mapping[str, Any]) -> Sample | None:
        if self._preprocess.tokenizer is None:
            return None
        places = [place for place, _ in self._tokens(row)]
        return sample.of_words(self._program, x, torch.tensor(places, dtype=torch.int64))

    def _table(self, x: Tensor) -> Sample:
        columns = self.schema.columns
        sizes = [sum(feature.blocks) for feature in self._preprocess.features]
        part_of = torch.repeat_interleave(torch.arange(len(columns)), torch.tensor(sizes))
        baseline = torch.zeros_like(x) if self._baseline is None else self._baseline
        return sample.of_numbers(self._program, x, baseline, part_of, torch.arange(len(columns)))

    def _tokens(self, row: Mapping[str, Any]) -> list[tuple[int, tuple[int, int]]]:
        """Which of the numbers that the model gets are words, and where they are in the text."""
        assert self._preprocess.tokenizer is not None
        found = self._preprocess.tokenizer.encode(row[self.schema.columns[0].name])
        marks = found.special_tokens_mask  # such as those that begin and end a text, or fill it up
        return [(n, at) for n, at in enumerate(found.offsets) if not marks[n]]

    def _baseline_name(self, kind: str) -> str:
        if kind == "image":
            return "a black image"
        if kind == "text":
            return "no words"
        return "means of the training rows"

    def _form(self, kind: str, numbers: list[float], row: Mapping[str, Any]) -> dict[str, Any]:
        columns = self.schema.columns
        if kind == "image":
            height, width = columns[0].shape[:2]
            weights = np.array(numbers).reshape(height, width)
            shown = np.asarray(row[columns[0].name], np.float32)
            low, high = columns[0].low or 0.0, columns[0].high or 255.0
            png = heatmap.png((shown - low) / (high - low), weights)
            return {"weights": weights.tolist(), "heat_map": png}
        if kind == "text":
            text = row[columns[0].name]
            spans = zip((at for _, at in self._tokens(row)), numbers, strict=True)
            return {
                "parts": [
                    Part(name=text[start:end], start=start, end=end, weight=weight)
                    for (start, end), weight in spans
                ]
            }
        parts = [
            Part(name=column.name, value=_plain(row[column.name]), weight=weight)
            for column, weight in zip(columns, numbers, strict=True)
        ]
        return {"parts": sorted(parts, key=lambda part: -abs(part.weight))}


def _patch(size: int) -> Tensor:
    """[size] The patch that each pixel along a side is in."""
    return torch.arange(size) // math.ceil(size / PATCHES)


def _plain(value: Any) -> float | str | None:
    if isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None  # which a column may lack
