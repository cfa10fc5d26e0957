"""Read, change and write experiments. Every problem is reported at once, with its line."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lepton_ray.config.schema import SCHEMA_VERSION, Experiment
from lepton_ray.errors import ExperimentError, nearest

Lines = dict[str, int]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (``1e-4`` is a number) and truth values (``yes`` is a text), and no repeated
    keys."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in found if tag != "tag:yaml.org,2002:bool"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would take for numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load(path: str | Path, settings: typing.Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file, with ``--set`` texts (``train.epochs=3``) applied.

    Raises:
        ExperimentError: with every problem found, each with its line.
    """
    source = str(path)
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(source, [f"cannot be read: {error}"]) from error
    return loads(text, source=source, settings=settings)


def loads(text: str, source: str = "experiment", settings: typing.Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML text; see `load`."""
    raw, lines = _parse(text, source)
    problems = []
    for setting in settings:
        dotted, sign, value = setting.partition("=")
        if not sign:
            problems.append(f"--set {setting}: must read PATH=VALUE, as in train.epochs=3")
            continue
        try:
            set_dotted(raw, dotted.strip(), yaml.load(value, _Loader))
        except (KeyError, yaml.YAMLError) as error:
            problems.append(f"--set {setting}: {error.args[0] if error.args else error}")
    if problems:
        raise ExperimentError(source, problems)
    return validate(raw, source, lines)


def validate(
    raw: dict[str, Any], source: str = "experiment", lines: Lines | None = None
) -> Experiment:
    """An experiment from plain values.

    Raises:
        ExperimentError: with every problem found.
    """
    try:
        return Experiment.model_validate(_upgrade(dict(raw), source))
    except ValidationError as error:
        problems = [_describe(e, raw, lines or {}) for e in error.errors()]
        raise ExperimentError(source, problems) from None


def with_settings(experiment: Experiment, settings: dict[str, Any]) -> Experiment:
    """A copy with dotted paths set; validated as a whole.

    Raises:
        ExperimentError: for a path or value the schema does not allow.
    """
    raw = experiment.model_dump(mode="json")
    for dotted, value in settings.items():
        try:
            set_dotted(raw, dotted, value)
        except KeyError as error:
            raise ExperimentError(experiment.name, [str(error.args[0])]) from None
    return validate(raw, experiment.name)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path: ``{"train": {"epochs": 3}}`` -> ``{"train.epochs": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def set_dotted(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``raw[a][b][c]`` for ``a.b.c``, making sections on the way.

    Raises:
        KeyError: when a part of the way is a value, not a section.
    """
    *sections, last = dotted.split(".")
    for i, section in enumerate(sections):
        if raw.get(section) is None:
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise KeyError(f"{'.'.join(sections[: i + 1])} is a value, not a section")
    raw[last] = value


def render(experiment: Experiment) -> str:
    """The experiment as YAML with every default written out; `loads` reads it back equal."""
    return yaml.dump(experiment.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=100)


def render_value(value: Any) -> str:
    """One setting's value as YAML on one line, which `loads` reads back equal."""
    return (
        yaml.dump(
            value,
            Dumper=_Dumper,
            default_flow_style=True,
            sort_keys=False,
            allow_unicode=True,
            width=float("inf"),
        )
        .removesuffix("...\n")
        .strip()
    )


def settings_of(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted path the schema names (open sections besides may have more)."""
    paths = []
    for name, field in cls.model_fields.items():
        sections = _sections(field.annotation)
        for section in sections:
            paths += settings_of(section, f"{prefix}{name}.")
        if not sections:
            paths.append(f"{prefix}{name}")
    return paths


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [s for arg in typing.get_args(annotation) for s in _sections(arg)]
    return []


def _parse(text: str, source: str) -> tuple[dict[str, Any], Lines]:
    try:
        node = yaml.compose(text, _Loader)
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ExperimentError(source, [f"{where}not valid YAML: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise ExperimentError(source, [f"not valid YAML: {error}"]) from None
    if not isinstance(raw, dict):
        raise ExperimentError(
            source, ["must be a mapping with at least the keys name, data and model"]
        )
    lines: Lines = {}
    _collect_lines(node, "", lines)
    return raw, lines


def _collect_lines(node: yaml.Node | None, prefix: str, lines: Lines) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            _collect_lines(value, f"{prefix}{key.value}.", lines)


def _upgrade(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Bring a file of an older format up to date. Version 1 is the first, so there is none yet."""
    version = raw.get("version", SCHEMA_VERSION)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ExperimentError(
            source,
            [
                f"version is {version}, this lepton_ray reads up to {SCHEMA_VERSION}: "
                "install a newer lepton_ray"
            ],
        )
    return raw


def _describe(error: Any, raw: dict[str, Any], lines: Lines) -> str:
    """One line for one problem: where, the rule, the value, the way out."""
    path, valid = _locate(error["loc"], raw, is_unknown=error["type"] == "extra_forbidden")
    dotted = ".".join(path)
    line = next(
        (lines[d] for n in range(len(path), 0, -1) if (d := ".".join(path[:n])) in lines), 0
    )
    where = (f"line {line}: " if line else "") + (f"{dotted}: " if dotted else "")
    message: str = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key {path[-1]!r}, {nearest(path[-1], valid)}"
    if error["type"] == "missing":
        return f"{where}this key is required"
    if error["type"] == "union_tag_not_found":
        return f"{where}the key 'kind' is required: {', '.join(_kinds(path[-1]))}"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return (
            f"{where}kind {context['tag']!r} is not supported by this version, "
            f"supported: {context['expected_tags']}"
        )
    got = error.get("input")
    shown = "" if isinstance(got, dict) or error["type"] == "value_error" else f", but got {got!r}"
    return f"{where}{message[:1].lower()}{message[1:]}{shown}"


def _locate(
    location: tuple[Any, ...], raw: dict[str, Any], is_unknown: bool
) -> tuple[list[str], list[str]]:
    """Pydantic's location as the path the person wrote, and the keys valid beside its end.

    Pydantic puts the tag of a union and the names of validators into the location; the walk over
    the schema drops them.
    """
    path: list[str] = []
    sections: list[type[BaseModel]] = [Experiment]
    valid: list[str] = []
    is_key = False  # the next part is a key of a free mapping, such as tune.space
    for part in location:
        fields = {n: f for s in sections for n, f in s.model_fields.items()}
        if is_key:
            path.append(str(part))
            is_key = False
        elif part in fields:
            path.append(str(part))
            valid = sorted(fields)
            annotation = fields[part].annotation
            is_key = typing.get_origin(annotation) is dict
            sections = _sections(typing.get_args(annotation)[1] if is_key else annotation)
        elif isinstance(part, str) and _reaches(raw, [*path, part]):
            path.append(part)
            valid = sorted(fields)
            sections = []
        elif is_unknown and part == location[-1]:
            path.append(str(part))
            valid = sorted(fields)
        else:
            narrowed = [s for s in sections if str(part) in _tags(s)]
            sections = narrowed or sections
    return path, valid


def _kinds(section: str) -> list[str]:
    """The tags of a section of several kinds."""
    return [
        str(t) for s in _sections(Experiment.model_fields[section].annotation) for t in _tags(s)
    ]


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    kind = section.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _reaches(raw: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return True
