"""The runtime of a version: ONNX Runtime on one thread, or torch on a GPU, with the fitted
preprocessing.

On a CPU usable without Ray and without torch: ``load_model("digits@champion").predict(rows)``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import GraphOptimizationLevel as Level

from lepton_ray.data import decision, drift, fitted
from lepton_ray.data.decision import AnyDecision
from lepton_ray.data.fitted import Fitted
from lepton_ray.data.preprocess import Inputs
from lepton_ray.data.schema import Schema
from lepton_ray.serving import manifest as manifests
from lepton_ray.serving.answers import form_of
from lepton_ray.serving.given import as_rows
from lepton_ray.serving.requests import ENDLESS, Problem, RowsError, columns_of

if TYPE_CHECKING:
    from lepton_ray.serving.given import Rows

Floats = npt.NDArray[np.floating]

DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
EXAMPLES = "examples.json"
DECISION = "decision.json"
CHUNK = 256  # rows of one forward pass in `predict`; bounds memory for a large file


class Model(Protocol):
    """What of a version computes."""

    def __call__(self, x: Inputs) -> npt.NDArray[np.float32]:
        """[n, outputs] from inputs [n, ...]."""

    def blank(self, rows: int) -> Inputs:
        """Inputs of zeros."""


class OnnxModel:
    """See `Model`.

    Args:
        level: of graph optimization; default all.
    """

    def __init__(self, path: Path, level: Level = Level.ORT_ENABLE_ALL) -> None:
        self._session = open_session(path, level)

    def __call__(self, x: Inputs) -> npt.NDArray[np.float32]:
        return run_session(self._session, x)

    def blank(self, rows: int) -> Inputs:
        taken = self._session.get_inputs()[0]
        zeros: Inputs = np.zeros((rows, *taken.shape[1:]), DTYPES[taken.type])
        return zeros


class Runtime:
    """One model version, ready to answer. Make one with `load`.

    Attributes:
        schema: the columns it takes and the classes it answers with.
        decision: how its outputs become probabilities and a class, or labels.
        manifest: where it came from.
        name, version: in the registry; "" and 0 for a folder that is not registered.
        examples: test samples that it carries, each with ``row`` and true ``answer``.
    """

    def __init__(
        self,
        model: Model,
        preprocess: Fitted,
        schema: Schema,
        decision: AnyDecision,
        manifest: dict[str, Any],
        name: str,
        version: int,
        examples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._model = model
        self._preprocess = preprocess
        self.schema = schema
        self.decision = decision
        self.manifest = manifest
        self.name = name
        self.version = version
        self.examples = examples
        self._form = form_of(schema)

    @staticmethod
    def load(folder: Path, *, name: str = "", version: int = 0, device: str = "") -> Runtime:
        """Open a version's folder after checking every file's SHA-256.

        Args:
            device: of torch, such as ``cuda``; default none, ONNX Runtime on a CPU.

        Raises:
            ModelError: for a newer format or changed files, or where the device answers otherwise.
            ServingError: when there is no such device.
        """
        manifest = manifests.verify(folder)
        schema = Schema.from_json(json.loads((folder / "schema.json").read_text()))
        model = _model(folder, device, manifest)
        listed = folder / EXAMPLES
        examples = json.loads(listed.read_text()) if listed.exists() else ()
        preprocess = fitted.load(folder)
        decided = read_decision(folder, schema)
        return Runtime(model, preprocess, schema, decided, manifest, name, version, examples)

    def predict(self, rows: Rows, *, top_k: int | None = None) -> list[Any]:
        """An answer for each row, see `answers.form_of`.

        Args:
            rows: see `given.as_rows`, as for `client.Client.predict`.
            top_k: only so many of the likeliest classes, or so many items of a ranking.

        Raises:
            InputError: for what are no rows.
            RowsError: when rows do not fit the columns, or have no finite answer.
        """
        listed = as_rows(rows, lambda: [column.name for column in self.schema.columns])
        return self.answers(self.predict_columns(columns_of(self.schema, listed)), top_k)

    def predict_columns(self, columns: Mapping[str, Any]) -> Floats:
        """[n, outputs] Probabilities of classes, scores of items, or values.

        Args:
            columns: column name -> values [n, ...], already checked.
        """
        n = len(next(iter(columns.values())))
        parts = [
            self.forward({name: values[at : at + CHUNK] for name, values in columns.items()})
            for at in range(0, n, CHUNK)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.schema.outputs))

    def measured(self, columns: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """What of rows is compared with the training data, see `drift.measured`."""
        return drift.measured(self._preprocess, columns)

    def warm_up(self, rows: int = 1) -> None:
        """Answer once, so that the first request does not pay for what the model sets up."""
        self._model(self._model.blank(rows))

    def forward(self, columns: Mapping[str, Any]) -> Floats:
        """The same for one batch, in one forward pass; NaN for a row of infinite inputs."""
        x = self._preprocess.apply(columns)
        outputs = self._model(x)
        # Some models have a number for infinity: a ReLU makes nothing of what is below zero.
        outputs[~np.isfinite(x).reshape(len(x), -1).all(axis=1)] = np.nan
        if self.schema.classes:
            return self.decision.probabilities(outputs)
        return self._preprocess.restore(outputs, x)

    def answered(self, found: Floats) -> npt.NDArray[np.bool_]:
        """[n] Whether each row has an answer, by what `predict_columns` gave."""
        # Minus infinity is the score of an item that is not to be answered.
        hidden = np.isneginf(found) & (self.schema.task == "ranking")
        return np.asarray((np.isfinite(found) | hidden).all(axis=1))

    def agree(self, found: Floats, other: Runtime, theirs: Floats, tolerance: float) -> int:
        """For how many rows the answers of two versions are alike: the same labels or best item, or
        values that are near.

        Args:
            found, theirs: what each gave, see `predict_columns`.
            tolerance: in deviations of this one's training targets.
        """
        if self.schema.classes:
            same = self.decision.chosen(found) == other.decision.chosen(theirs)
            return int(same.reshape(len(found), -1).all(axis=1).sum())
        if self.schema.task == "ranking":
            best = zip(found.argmax(1), theirs.argmax(1), strict=True)
            return sum(self.schema.items[a] == other.schema.items[b] for a, b in best)
        near = tolerance * self._preprocess.target_deviation
        return int((np.abs(found - theirs) <= near).all(axis=1).sum())

    def answers(self, found: Floats, top_k: int | None = None) -> list[Any]:
        """What `predict_columns` gave, in the form that goes over HTTP.

        Raises:
            RowsError: for rows whose numbers are so large that the answer is none.
        """
        wrong = np.flatnonzero(~self.answered(found)).tolist()
        if wrong:
            raise RowsError([Problem(row, "", ENDLESS, "nan") for row in wrong])
        return self._form.answers(found, self.decision, top_k)


def _model(folder: Path, device: str, manifest: Mapping[str, Any]) -> Model:
    on_cpu = OnnxModel(folder / "model.onnx")
    if not device:
        return on_cpu
    from lepton_ray.serving.torch_model import Form, TorchModel  # and torch

    model = TorchModel(folder / "model.pt2", device, Form(**manifest.get(manifests.TORCH, {})))
    model.check(on_cpu)
    return model


def read_decision(folder: Path, schema: Schema) -> AnyDecision:
    """Of a version; versions of format 1 have none."""
    path = folder / DECISION
    if not path.exists():
        return decision.plain(schema)
    return decision.from_json(schema, json.loads(path.read_text()))


def open_session(path: Path, level: Level = Level.ORT_ENABLE_ALL) -> onnxruntime.InferenceSession:
    """One thread: a replica has one CPU, and the threads are part of what the bytes depend on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, x: Inputs) -> npt.NDArray[np.float32]:
    """[n, classes] Logits from inputs [n, ...]."""
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    result: npt.NDArray[np.float32] = logits
    return result
