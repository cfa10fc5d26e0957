"""A pretrained model of texts, ``hf:NAME``: its configuration, tokenizer and weights, and no code.

NAME is a folder or a name on the Hugging Face hub. All is read once, by the driver, and travels to
the replicas with the data: no worker needs the folder or the hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lepton_ray.errors import ExperimentError

PREFIX = "hf:"
WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
PATTERNS = ["config.json", "tokenizer*.json", "special_tokens_map.json", "model*.safetensors*"]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    name: str
    """As ``model.name`` has it."""
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    """Cuts and fills up nothing yet; see `words.adopt`."""
    padding: int
    """Number of the token that fills up a text."""
    weights: Mapping[str, npt.NDArray[np.uint8]]
    """File -> its content, all safetensors."""
    sha256: str
    """Of the file of weights, as the hub shows it; of several, over their names and digests."""

    def identity(self) -> Iterator[bytes]:
        """What the result of a training depends on."""
        yield self.sha256.encode()
        yield json.dumps(self.config, sort_keys=True).encode()
        yield self.tokenizer.to_str().encode()


def is_pretrained(name: str) -> bool:
    """Whether ``model.name`` means one."""
    return name.startswith(PREFIX)


def local_path(name: str) -> str | None:
    """The folder that ``model.name`` means; None where it means one on the hub.

    A path from the working folder, as all paths of an experiment.
    """
    place = name.removeprefix(PREFIX)
    is_path = place.startswith((".", "/", "~")) or place.count("/") > 1 or Path(place).is_dir()
    return place if is_path and is_pretrained(name) else None


def read(name: str) -> Pretrained:
    """The model that ``model.name`` means.

    Raises:
        ExperimentError: when it is not there, lacks a file, or has weights in pickles only.
    """
    folder = _folder(name)
    config = _json(name, folder / "config.json")
    if not (folder / TOKENIZER).is_file():
        raise _problem(
            name,
            f"{folder} has no {TOKENIZER}: write it with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises nothing narrower
        raise _problem(name, f"{folder / TOKENIZER} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    weights, digest = _weights(name, folder)
    return Pretrained(
        name=name,
        config=config,
        tokenizer=tokenizer,
        padding=_padding(name, folder, config, tokenizer),
        weights=weights,
        sha256=digest,
    )


def _folder(name: str) -> Path:
    local = local_path(name)
    if local is not None:
        folder = Path(local).expanduser()
        if not folder.is_dir():
            raise _problem(name, f"no folder {local!r} (looked in {Path.cwd()}): correct it")
        return folder
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=PATTERNS)
        )
    except Exception as error:  # of the network, the hub, or the name's form
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _problem(
            name,
            f"neither a folder in {Path.cwd()} nor to be had from the Hugging Face hub ({said}): "
            "correct the name, or name a folder that holds the model, as hf:./FOLDER",
        ) from error


def _weights(name: str, folder: Path) -> tuple[dict[str, npt.NDArray[np.uint8]], str]:
    if (folder / INDEX).is_file():
        files = sorted(set(_json(name, folder / INDEX).get("weight_map", {}).values()))
    else:
        files = [WEIGHTS]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or not files:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        way_out = (
            f" but {pickles[0]}, a pickle, which can run code and is not read: convert it where "
            "you trust it, with transformers' from_pretrained(FOLDER).save_pretrained(FOLDER)"
            if pickles
            else ": save the model with transformers' save_pretrained(FOLDER)"
        )
        raise _problem(name, f"{folder} has no {(missing or [WEIGHTS])[0]}{way_out}")
    weights = {file: np.fromfile(folder / file, np.uint8) for file in files}
    digests = {file: hashlib.sha256(content.data).hexdigest() for file, content in weights.items()}
    if len(files) == 1:
        return weights, digests[files[0]]
    told = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
    return weights, hashlib.sha256(told.encode()).hexdigest()


def _padding(name: str, folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    """The tokenizer's own settings name it, or the model's do."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        told = _json(name, folder / file) if (folder / file).is_file() else {}
        token = told.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (number := tokenizer.token_to_id(str(token))) is not None:
            return int(number)
    number = config.get("pad_token_id")
    if number is None:
        raise _problem(
            name,
            "names no token that fills up a text, neither as pad_token in tokenizer_config.json "
            "nor as pad_token_id in config.json: add one, such as its end-of-text token",
        )
    return int(number)


def _json(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _problem(name, f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise _problem(name, f"{path} must hold an object of JSON, but holds {str(value)[:80]}")
    return value


def _problem(name: str, said: str) -> ExperimentError:
    return ExperimentError("experiment", [f"model.name: {name!r}: {said}"])
