"""docs/SETTINGS.md, made from the settings' own types and descriptions.

python -m impactx.settings_doc > docs/SETTINGS.md
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from impactx.settings import ExperimentSettings, settable
from impactx.settings.extensions import registry_of, tagged

HEAD = """\
# Settings

Made by `python -m impactx.settings_doc > docs/SETTINGS.md`; do not edit.

Any of them can be given on the command line as `setting=value`, for instance `training.epochs=20`,
`grid.batch_size=[32,64]`, `approaches.impactx.lambdas=[0.8]`. `<name>` is a name of yours: `datasets.<name>.path`
is written `datasets.cifar10.path`. A list of numbers may also be a range `{start: 0.2, stop: 1.4, step: 0.2}`.
The presets and groups in configs/ set some of these; what they leave out has the default given here.
"""


def settings_markdown() -> str:
    """Every setting: dotted name, what is allowed, default, meaning."""
    lines = [HEAD]
    for title, model, fields in _tables("", ExperimentSettings):
        about = " ".join((model.__doc__ or "").split())
        lines += [f"## {title}" if title else "## The experiment", "", about, "",
                  "| setting | allowed | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {_cell(_allowed(info.annotation, info.metadata))} | {_cell(_default(info))} "
                  f"| {_cell(info.description or '')} |" for name, info in fields]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _tables(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], list]]:
    """The plain settings of a class, then those of the classes inside it."""
    plain, inner = [], []
    for name, info in settable(model).items():
        found, path = _nested(info.annotation)
        if not found or path == "[]" or registry_of(info.annotation) is not None:
            plain.append((prefix + name, info))
        inner += [(f"{prefix}{name}{path}", tag, one) for tag, one in found.items()]
    yield prefix.rstrip("."), model, plain
    for name, tag, one in inner:
        for title, inside, fields in _tables(f"{name}.", one):
            yield f"{title}: {tag}" if tag and inside is one else title, inside, fields


def _nested(annotation: Any) -> tuple[dict[str, type[BaseModel]], str]:
    """The classes of settings inside a field by their tags ("" where there is only one), and what leads to them."""
    if typing.get_origin(annotation) is dict:
        return _nested(typing.get_args(annotation)[1])[0], ".<name>"
    if typing.get_origin(annotation) is list and (kind := registry_of(typing.get_args(annotation)[0])):
        return dict(kind.classes()), "[]"
    if kinds := _kinds(annotation):
        return {} if _optional(annotation) else kinds, ""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}, ""
    return {}, ""


def _kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """The classes by their tags of settings that may be of several; else empty."""
    registry = registry_of(annotation)
    return dict(tagged(annotation)) if registry is None else {name: registry.get(name) for name in registry.names()}


def _optional(annotation: Any) -> bool:
    """True for something or null: its settings stand where it must be given, and are not listed again."""
    return type(None) in typing.get_args(annotation)


_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "null"}
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": None, "max_length": "at most {} long"}


def _allowed(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if kind := registry_of(annotation):
        return f"settings of {', '.join(kind.names())}"
    if origin is typing.Annotated:
        return _allowed(arguments[0], [*arguments[1:], *metadata])
    if kinds := _kinds(annotation):
        return f"settings of {', '.join(kinds)}"
    if origin in (typing.Union, types.UnionType):
        text = " or ".join(_allowed(a) for a in arguments if a is not type(None))
        bounds = _bounds(metadata)
        return text + bounds + (" or null" if type(None) in arguments else "")
    if origin is typing.Literal:
        return ", ".join("null" if a is None else str(a) for a in arguments)
    if origin is list:
        return f"list of: {_allowed(arguments[0])}"
    if origin is tuple and arguments[-1] is ...:
        return f"list of: {_allowed(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_allowed(arguments[0])}"
    return _PLAIN.get(annotation, str(annotation)) + _bounds(metadata)


def _bounds(metadata: typing.Sequence[Any]) -> str:
    found = []
    for item in metadata:
        parts = item.metadata if isinstance(item, FieldInfo) else [item]
        for part in parts:
            found += [shown.format(value) for key, shown in _BOUNDS.items()
                      if shown and (value := getattr(part, key, None)) is not None]
            if pattern := getattr(part, "pattern", None):
                found.append(f"matching `{pattern}`")
    return " " + ", ".join(found) if found else ""


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "must be given"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    if isinstance(value, list) and (kind := registry_of(*typing.get_args(info.annotation)[:1])):
        return f"`{[getattr(one, kind.tag) for one in value]}`"
    if isinstance(value, tuple):
        value = list(value)
    if (registry := registry_of(info.annotation)) is not None:
        value = getattr(value, registry.tag)
    if isinstance(value, list) and len(value) > 8:
        return f"`{value[0]}`, `{value[1]}`, … `{value[-1]}` ({len(value)} values)"
    return f"`{value}`"


if __name__ == "__main__":
    print(settings_markdown(), end="")
