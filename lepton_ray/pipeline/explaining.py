"""Explain the rows of files, or pictures, as the endpoint does."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lepton_ray.errors import InputError
from lepton_ray.serving import blocks
from lepton_ray.serving.blocks import Source
from lepton_ray.serving.explain.answers import Explanation, check
from lepton_ray.serving.explain.explainer import Explainer
from lepton_ray.serving.requests import columns_of
from lepton_ray.terminal import Terminal
from lepton_ray.tracking import registry


def explain(
    reference: str,
    paths: Sequence[str],
    *,
    output: str | None,
    method: str | None,
    target: str | None,
    terminal: Terminal,
) -> dict[str, Any]:
    """Say why each row, or each picture, is answered as it is.

    Args:
        output: a ``.jsonl`` file, or for one picture a ``.png`` for its heat map; by default lines
            of JSON are told to the terminal.

    Raises:
        InputError: for what cannot be read, does not fit or is not there; nothing is written then.
    """
    explainer = Explainer.load(registry.resolve(reference).folder())
    check(explainer.schema, method, target)
    source = blocks.find(explainer.schema, paths, [])
    blocks.check_output(output, paths)
    suffix = PurePosixPath(output).suffix if output else ".jsonl"
    image = explainer.schema.columns[0].kind == "image"
    if suffix == ".png" and not (image and source.rows == 1):
        raise InputError("a .png is the heat map of one picture: write more, or others, to .jsonl")
    if suffix not in (".jsonl", ".png"):
        raise InputError(f"the output must end with .jsonl or .png, but is {output!r}")
    explained = _explained(explainer, source, method, target)
    if output is None:
        for kept, explanation in explained:
            terminal.say(_line(kept, explanation))
        return {"rows": source.rows, "output": None}
    done = list(explained)
    if suffix == ".png":
        ((_, only),) = done
        assert only.heat_map is not None
        content = base64.b64decode(only.heat_map)
    else:
        content = "".join(_line(*pair) + "\n" for pair in done).encode()
    try:
        Path(output).write_bytes(content)
    except OSError as error:
        raise InputError(f"{output!r} cannot be written: {error.strerror}") from error
    missed = sum(not explanation.completeness.holds for _, explanation in done)
    terminal.say(
        f"{len(done)} explanation{'s' * (len(done) != 1)} written to {output}"
        + (f"; the weights of {missed} do not add up to within 5% of the answer" if missed else "")
    )
    return {"rows": len(done), "output": output, "incomplete": missed}


def _explained(
    explainer: Explainer, source: Source, method: str | None, target: str | None
) -> Iterator[tuple[dict[str, Any], Explanation]]:
    for block in source.blocks:
        first = block.first
        for rows, kept in blocks.read(block, explainer.schema, []):
            with blocks.numbered(first):
                columns = columns_of(explainer.schema, rows)
            for at, beside in enumerate(kept):
                one = {name: values[at : at + 1] for name, values in columns.items()}
                with blocks.numbered(first + at):
                    (explanation,) = explainer.explain(one, method, target)
                yield beside, explanation
            first += len(rows)


def _line(kept: dict[str, Any], explanation: Explanation) -> str:
    return json.dumps({**kept, **explanation.model_dump(exclude_none=True)})
