"""Faster and smaller forms of a version's `model.onnx`, by ONNX Runtime's own tools."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime import GraphOptimizationLevel as Level
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from lepton_ray.data.preprocess import Inputs
from lepton_ray.errors import RunError
from lepton_ray.serving.runtime import Model, open_session

LEVELS = {
    "no graph optimization": Level.ORT_DISABLE_ALL,
    "basic graph": Level.ORT_ENABLE_BASIC,
    "extended graph": Level.ORT_ENABLE_EXTENDED,
}
"""Beside which stands what every endpoint runs: all of them."""
CALIBRATION = 256  # training samples that set the ranges of a static int8 model
CALIBRATED = 32  # of them in one pass
ROUNDS = 5  # of latencies, each candidate once in a round, so that a busy moment hits all


@dataclass(frozen=True, kw_only=True)
class Latency:
    p50_ms: float
    """Of one row."""
    p99_ms: float
    batch_ms: float
    """Median of a whole batch."""


def quantized(model: Path, folder: Path, calibration: Inputs) -> dict[str, Path | str]:
    """Name -> file of the int8 models that can be made of one, or why one cannot.

    Args:
        calibration: [n, ...] inputs of the training split.
    """
    made: dict[str, Path | str] = {}
    with _quiet():
        prepared = folder / "prepared.onnx"
        try:
            quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        except Exception as error:  # whatever a model's graph makes it raise
            return {"int8": f"cannot be made: {first_line(error)}"}
        for name in ("int8 dynamic", "int8 static"):
            path = folder / f"{name.replace(' ', '-')}.onnx"
            try:
                if name == "int8 dynamic":
                    quantize_dynamic(prepared, path, weight_type=QuantType.QInt8)
                else:
                    quantize_static(
                        prepared,
                        path,
                        _Calibration(model, calibration),
                        quant_format=QuantFormat.QDQ,
                        per_channel=True,
                        # Without instructions for int8 products, sums of full int8 would overflow.
                        reduce_range=True,
                        weight_type=QuantType.QInt8,
                    )
                open_session(path)
                made[name] = path
            except Exception as error:
                made[name] = f"cannot be made: {first_line(error)}"
    return made


def outputs(of: Model, x: Inputs, chunk: int) -> npt.NDArray[np.float32]:
    """[n, outputs]"""
    return np.concatenate([of(x[at : at + chunk]) for at in range(0, len(x), chunk)])


def neighbours_matter(of: Model, x: Inputs) -> float:
    """Largest difference that the rows beside a row make to its outputs."""
    return float(np.abs(of(x) - outputs(of, x, 1)).max())


def latencies(
    models: Mapping[str, Model], x: Inputs, *, batch: int, calls: int
) -> dict[str, Latency]:
    """How long each takes for one row and for a batch, in turn.

    Args:
        x: inputs to take rows from.
        calls: with one row, each in every round.
    """
    one: dict[str, list[float]] = {name: [] for name in models}
    whole: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, of in models.items():
            of(x[:1])
            for call in range(calls):
                row = x[call % len(x) : call % len(x) + 1]
                one[name].append(_seconds(of, row))
            whole[name] += [_seconds(of, x[:batch]) for _ in range(max(3, calls // 20))]
    return {
        name: Latency(
            p50_ms=float(np.median(one[name]) * 1000),
            p99_ms=float(np.percentile(one[name], 99) * 1000),
            batch_ms=float(np.median(whole[name]) * 1000),
        )
        for name in models
    }


def _seconds(of: Model, x: Inputs) -> float:
    start = time.perf_counter()
    of(x)
    return time.perf_counter() - start


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, model: Path, x: Inputs) -> None:
        name = open_session(model).get_inputs()[0].name
        parts = [x[at : at + CALIBRATED] for at in range(0, min(len(x), CALIBRATION), CALIBRATED)]
        if not parts:
            raise RunError(
                "a static int8 model needs samples to set its ranges, but there are none"
            )
        self._parts = iter([{name: part} for part in parts])

    def get_next(self) -> dict[str, Inputs] | None:
        return next(self._parts, None)


def first_line(error: Exception) -> str:
    """Of what it says, else its name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tools warn through the root logger about steps that were left out on purpose."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
