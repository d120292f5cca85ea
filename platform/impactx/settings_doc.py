"""The text of docs/SETTINGS.md, from the types and descriptions of the settings.

python -m impactx.settings_doc > docs/SETTINGS.md
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from impactx.settings import ExperimentSettings, settable
from impactx.settings.extensions import registry_of, tagged

HEAD = """\
# Settings

Made by `python -m impactx.settings_doc > docs/SETTINGS.md`; do not edit.

Any of them can be given on the command line as `setting=value`, for instance `training.epochs=20`,
`grid.batch_size=[32,64]`, `approaches.impactx.lambdas=[0.8]`. `<name>` is a name of yours:
`datasets.<name>.path` is written `datasets.cifar10.path`. A list of numbers may also be a range
`{start: 0.2, stop: 1.4, step: 0.2}`. The presets and groups in configs/ set some of these; the
others have the defaults given here.
"""
BAR = "\\|"  # a bar inside a cell of a table
LISTED = 8  # longest default list that is written in full


class Table(NamedTuple):
    """One table of the page: the fields of one class of settings.

    Attributes:
        title: The dotted name under which the class is set, and its tag if there are several.
        model: The class.
        fields: Its fields by their dotted names, in their order.
    """

    title: str
    model: type[BaseModel]
    fields: list[tuple[str, FieldInfo]]


def settings_markdown() -> str:
    """Return the page: every setting with its dotted name, its values, its default and meaning."""
    lines = [HEAD]
    for table in _tables("", ExperimentSettings):
        lines += [f"## {table.title or 'The experiment'}", "",
                  " ".join((table.model.__doc__ or "").split()), "",
                  "| setting | allowed | default | meaning |", "|---|---|---|---|"]
        for name, info in table.fields:
            cells = (f"`{name}`", _allowed(info.annotation, info.metadata), _default(info),
                     info.description or "")
            lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _tables(prefix: str, model: type[BaseModel]) -> Iterator[Table]:
    """Yield the table of a class of settings, and then those of the classes inside it.

    Args:
        prefix: The dotted name of the class with a dot at its end, "" for the outermost.
        model: The class.
    """
    plain: list[tuple[str, FieldInfo]] = []
    nested: list[tuple[str, str, type[BaseModel]]] = []
    for name, info in settable(model).items():
        classes, suffix = _nested(info.annotation)
        if not classes or suffix == "[]" or registry_of(info.annotation) is not None:
            plain.append((prefix + name, info))
        nested += [(f"{prefix}{name}{suffix}", tag, one) for tag, one in classes.items()]
    yield Table(prefix.rstrip("."), model, plain)
    for name, tag, one in nested:
        for table in _tables(f"{name}.", one):
            if tag and table.model is one:
                table = table._replace(title=f"{table.title}: {tag}")
            yield table


def _nested(annotation: Any) -> tuple[dict[str, type[BaseModel]], str]:
    """Return the classes of settings that a field holds.

    Args:
        annotation: The field's annotation.

    Returns:
        The classes by their tags ("" for one that has none), and what follows the field's name in
        the name of their settings: ".<name>", "[]" or "".
    """
    if typing.get_origin(annotation) is dict:
        return _nested(typing.get_args(annotation)[1])[0], ".<name>"
    if typing.get_origin(annotation) is list:
        registry = registry_of(typing.get_args(annotation)[0])
        if registry is not None:
            return dict(registry.classes()), "[]"
    if kinds := tagged(annotation):
        # The settings of an optional one are listed where it must be given, and not again.
        return {} if type(None) in typing.get_args(annotation) else dict(kinds), ""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}, ""
    return {}, ""


_PLAIN: dict[Any, str] = {
    int: "whole number", float: "number", str: "text", bool: "true, false",
    type(None): "null"}
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "max_length": "at most {} long"}


def _allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe the values that a field takes.

    Args:
        annotation: The field's annotation.
        metadata: Its constraints, as pydantic or `typing.Annotated` holds them.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if kinds := tagged(annotation):
        return f"settings of {', '.join(kinds)}"
    if origin is typing.Annotated:
        return _allowed(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        text = " or ".join(_allowed(one) for one in arguments if one is not type(None))
        return text + _bounds(metadata) + (" or null" if type(None) in arguments else "")
    if origin is typing.Literal:
        return ", ".join("null" if one is None else str(one) for one in arguments)
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return f"list of: {_allowed(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_allowed(arguments[0])}"
    return _PLAIN.get(annotation, str(annotation)) + _bounds(metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    bounds = []
    for item in metadata:
        for part in item.metadata if isinstance(item, FieldInfo) else [item]:
            for constraint, text in _BOUNDS.items():
                if (limit := getattr(part, constraint, None)) is not None:
                    bounds.append(text.format(limit))
            if pattern := getattr(part, "pattern", None):
                bounds.append(f"matching `{pattern}`")
    return " " + ", ".join(bounds) if bounds else ""


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "must be given"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (list, tuple)):
        kind = registry_of(next(iter(typing.get_args(info.annotation)), None))
        values = [one if kind is None else getattr(one, kind.tag) for one in value]
        if len(values) > LISTED:
            return f"`{values[0]}`, `{values[1]}`, … `{values[-1]}` ({len(values)} values)"
        return f"`{values}`"
    if (registry := registry_of(info.annotation)) is not None:
        value = getattr(value, registry.tag)
    return f"`{value}`"


if __name__ == "__main__":
    print(settings_markdown(), end="")
