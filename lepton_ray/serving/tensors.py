"""The Open Inference Protocol, version 2: its tensors as rows, answers as its tensors.

Sources: the protocol's ``inference_rest.md`` (KServe), and Triton's ``extension_binary_data.md``
for tensors behind the JSON (``Inference-Header-Content-Length``). Pure: no HTTP here.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_ray.data.schema import Column, Schema
from lepton_ray.serving.answers import form_of
from lepton_ray.serving.refusals import RefusedError

Array = npt.NDArray[Any]

NUMBERS = {
    "BOOL": np.dtype("?"),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
MAX_RANK = 8
MAX_SIZE = 1 << 40  # values; NumPy multiplies a shape also where one of it is 0


@dataclass(frozen=True)
class Tensor:
    """Of a request or an answer."""

    name: str
    datatype: str
    values: Array
    """[n, ...]; texts as objects."""


@dataclass(frozen=True)
class Inference:
    """A request to infer."""

    id: str | None
    inputs: tuple[Tensor, ...]
    wanted: dict[str, bool]
    """Output name -> whether it goes back as binary data; empty for all of them."""
    binary: bool
    """Whether outputs go back as binary data where ``wanted`` does not say."""


def inputs_of(schema: Schema) -> list[dict[str, Any]]:
    """The tensors a model takes, in the words of its metadata; -1 is the number of rows."""
    return [
        {"name": c.name, "datatype": _datatype(c), "shape": [-1, *c.shape]} for c in schema.columns
    ]


def outputs_of(schema: Schema) -> list[dict[str, Any]]:
    """The tensors it answers with."""
    return [
        {
            "name": output.name,
            "datatype": output.datatype,
            "shape": [-1, *output.shape],
            **({"parameters": output.parameters} if output.parameters else {}),
        }
        for output in form_of(schema).outputs
    ]


def decode(body: bytes, header_length: str | None) -> Inference:
    """A request of one JSON object, with binary tensors behind it.

    Args:
        header_length: what ``Inference-Header-Content-Length`` says: bytes of JSON; None for all.

    Raises:
        RefusedError: 422, naming the tensor and the rule.
    """
    length = len(body)
    if header_length is not None:
        _demand(
            header_length.isascii() and header_length.isdecimal() and len(header_length) < 18,
            f"Inference-Header-Content-Length must be a number, but got {header_length[:20]!r}",
        )
        length = int(header_length)
        _demand(
            length <= len(body),
            f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes",
        )
    try:
        value = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise RefusedError(422, f"the body must be JSON: {error}") from None
    _demand(isinstance(value, dict), "the body must be a JSON object with inputs")
    given = value.get("inputs")
    _demand(isinstance(given, list) and bool(given), "inputs must list at least one tensor")
    id_ = value.get("id")
    _demand(id_ is None or isinstance(id_, str), "id must be a string")
    inputs: dict[str, Tensor] = {}
    at = length
    for position, one in enumerate(given):
        tensor, at = _tensor(one, f"inputs[{position}]", body, at)
        _demand(tensor.name not in inputs, f"input {tensor.name[:80]!r} is given twice")
        inputs[tensor.name] = tensor
    _demand(at == len(body), f"{len(body) - at} bytes behind the last tensor belong to none")
    counts = {len(tensor.values) for tensor in inputs.values()}
    _demand(len(counts) == 1, f"inputs must have as many rows each, but have {sorted(counts)[:9]}")
    binary = _parameters(value, "the request").get("binary_data_output", False)
    _demand(isinstance(binary, bool), "binary_data_output must be true or false")
    return Inference(id_, tuple(inputs.values()), _wanted(value.get("outputs"), binary), binary)


def rows_of(schema: Schema, inputs: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    """One row of plain values for each first index; not yet checked against the schema.

    A column of single values may come as [n] or [n, 1].
    """
    flat = {c.name for c in schema.columns if not c.shape}
    columns = {}
    for tensor in inputs:
        values = tensor.values
        if tensor.name in flat:
            values = values[:, 0] if values.shape[1:] == (1,) else values
            columns[tensor.name] = values.tolist()
        else:
            columns[tensor.name] = list(values)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def outputs(schema: Schema, found: Array, answers: list[Any]) -> tuple[Tensor, ...]:
    """The tensors of an answer.

    Args:
        found: [n, outputs], as `Runtime.predict_columns` gives it.
        answers: the same as `Runtime.answers` gives them.
    """
    return tuple(
        Tensor(output.name, output.datatype, output.values(found, answers))
        for output in form_of(schema).outputs
    )


def encode(
    asked: Inference, tensors: tuple[Tensor, ...], model: str, version: int
) -> tuple[bytes, int | None]:
    """The body of an answer, and how many bytes of it are JSON where binary tensors follow.

    Raises:
        RefusedError: 422 for an output that there is not.
    """
    known = {t.name for t in tensors}
    for name in asked.wanted:
        _demand(name in known, f"no such output {name[:80]!r}; known: {', '.join(sorted(known))}")
    parts: list[bytes] = []
    described = []
    for tensor in tensors:
        if asked.wanted and tensor.name not in asked.wanted:
            continue
        one: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.values.shape),
        }
        if asked.wanted.get(tensor.name, asked.binary):
            parts.append(_packed(tensor))
            one["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            one["data"] = tensor.values.ravel().tolist()
        described.append(one)
    value: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if asked.id is not None:
        value["id"] = asked.id
    head = json.dumps({**value, "outputs": described}).encode()
    return b"".join([head, *parts]), len(head) if parts else None


def _datatype(column: Column) -> str:
    if column.kind == "image":
        return "FP32"
    return "FP64" if column.kind in ("number", "series") else "BYTES"


def _tensor(value: Any, where: str, body: bytes, at: int) -> tuple[Tensor, int]:
    """A tensor, and where the next one's binary data start."""
    _demand(isinstance(value, dict), f"{where} must be an object")
    name, shape, datatype = value.get("name"), value.get("shape"), value.get("datatype")
    _demand(isinstance(name, str), f"{where}.name must be a string")
    where = f"input {name[:80]!r}"
    _demand(
        datatype == "BYTES" or (isinstance(datatype, str) and datatype in NUMBERS),
        f"{where}: datatype must be one of BYTES, {', '.join(NUMBERS)}, but got "
        f"{repr(datatype)[:80]}",
    )
    _demand(
        isinstance(shape, list)
        and 0 < len(shape) <= MAX_RANK
        and all(type(n) is int and n >= 0 for n in shape)
        and math.prod(n for n in shape if n) < MAX_SIZE,
        f"{where}: shape must be 1 to {MAX_RANK} whole numbers that a body can hold, but got "
        f"{repr(shape)[:80]}",
    )
    count = math.prod(shape)
    size = _parameters(value, where).get("binary_data_size")
    if size is None:
        flat = _listed(value.get("data"), datatype, count, where)
    else:
        _demand("data" not in value, f"{where}: data or binary_data_size, not both")
        _demand(
            type(size) is int and 0 <= size <= len(body) - at,
            f"{where}: binary_data_size is {repr(size)[:20]}, but {len(body) - at} bytes are left",
        )
        flat = _unpacked(body[at : at + size], datatype, count, where)
        at += size
    return Tensor(name, datatype, flat.reshape(shape)), at


def _listed(data: Any, datatype: str, count: int, where: str) -> Array:
    """The values of ``data``, which is flat or nested in lists."""
    _demand(isinstance(data, list), f"{where}: data must be a list, or binary_data_size be given")
    flat = data
    for _ in range(MAX_RANK):
        if not flat or not all(isinstance(v, list) for v in flat):
            break
        flat = [v for inner in flat for v in inner]
    _demand(len(flat) == count, f"{where}: its shape holds {count} values, but data {len(flat)}")
    if datatype == "BYTES":
        _demand(all(type(v) is str for v in flat), f"{where}: data of BYTES must be strings")
        return np.array([*flat, None], object)[:-1]  # None, or lists of one length would be split
    dtype = NUMBERS[datatype]
    kinds: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    allowed = kinds.get(dtype.kind, {int})
    _demand({type(v) for v in flat} <= allowed, f"{where}: data must be of {datatype}")
    try:
        with np.errstate(over="ignore"):  # beyond FP16 is infinite, which the schema's check names
            return np.array(flat, dtype)
    except OverflowError:
        raise RefusedError(422, f"{where}: a value is beyond {datatype}") from None


def _unpacked(data: bytes, datatype: str, count: int, where: str) -> Array:
    """The values of a binary tensor: little endian; before each of BYTES its length, in 4 bytes."""
    if datatype != "BYTES":
        dtype = NUMBERS[datatype]
        _demand(
            len(data) == count * dtype.itemsize,
            f"{where}: {count} values of {datatype} take {count * dtype.itemsize} bytes, but "
            f"binary_data_size is {len(data)}",
        )
        stored = np.dtype(np.uint8) if datatype == "BOOL" else dtype  # any byte but 0 is true
        return np.frombuffer(data, stored).astype(dtype)
    texts: list[str] = []
    at = 0
    while at < len(data):
        _demand(at + 4 <= len(data), f"{where}: a length is cut off")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        _demand(at + size <= len(data), f"{where}: a text of {size} bytes is cut off")
        try:
            texts.append(data[at : at + size].decode())
        except UnicodeDecodeError as error:
            raise RefusedError(422, f"{where}: a text must be UTF-8: {error}") from None
        at += size
    _demand(len(texts) == count, f"{where}: its shape holds {count} values, but data {len(texts)}")
    return np.array([*texts, None], object)[:-1]


def _packed(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return np.ascontiguousarray(tensor.values, NUMBERS[tensor.datatype]).tobytes()
    texts = [text.encode() for text in tensor.values.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _wanted(value: Any, binary: bool) -> dict[str, bool]:
    _demand(value is None or isinstance(value, list), "outputs must be a list")
    wanted: dict[str, bool] = {}
    for position, one in enumerate(value or []):
        where = f"outputs[{position}]"
        name: Any = one.get("name") if isinstance(one, dict) else None
        _demand(isinstance(name, str), f"{where} must be an object with a name")
        as_binary = _parameters(one, where).get("binary_data", binary)
        _demand(isinstance(as_binary, bool), f"{where}: binary_data must be true or false")
        wanted[name] = as_binary
    return wanted


def _parameters(value: dict[str, Any], where: str) -> dict[str, Any]:
    found = value.get("parameters", {})
    _demand(isinstance(found, dict), f"{where}: parameters must be an object")
    result: dict[str, Any] = found
    return result


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise RefusedError(422, rule)
