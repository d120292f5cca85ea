"""Pydantic's validation errors as sentences that name the setting as a user writes it."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from impactx.settings import Settings, settable
from impactx.settings.extensions import registry_of, tagged
from impactx.settings.registry import UNKNOWN, UNNAMED

SHOWN = 100  # longest value, in characters, that a message shows whole


class Location(NamedTuple):
    """A place in the settings.

    Attributes:
        path: The parts of its dotted name, without those that pydantic adds.
        model: The annotation or class of the settings that are there; None if it is not known.
    """

    path: list[Any]
    model: Any


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return "did you mean ...? " with the allowed name that is closest, or "" without any."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def in_words(error: ErrorDetails, root: type[Settings], data: Any) -> str:
    """Return one sentence on an error: the setting, its value, and what is allowed.

    Args:
        error: One of `ValidationError.errors()`.
        root: The class that was validated.
        data: The plain data that were validated.
    """
    location = _locate(error["loc"], root, data)
    name = ".".join(map(str, location.path)) or "the whole"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        parent = _locate(error["loc"][:-1], root, data).model
        return f"{name} = {error['input']!r}: {_no_such_setting(str(location.path[-1]), parent)}"
    if kind == UNNAMED:
        return f"{name}.{error['msg']}"
    if kind == UNKNOWN:
        return f"{name}.{context['tag']} = {context['value']!r}: {error['msg']}"
    if kind == "missing":
        return f"{name} is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag, names = context["discriminator"].strip("'"), list(tagged(location.model))
        if kind == "union_tag_not_found":
            return f"{name}.{tag} is missing; there are {', '.join(names)}"
        value = context["tag"]
        return (f"{name}.{tag} = {value!r}: no such choice; {did_you_mean(value, names)}"
                f"there are {', '.join(names)}")
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error["input"])
    if len(shown) >= SHOWN:
        shown = f"{shown[:SHOWN - 3]}..."
    return f"{name} = {shown}: {message[0].lower()}{message[1:]}"


def _no_such_setting(name: str, model: Any) -> str:
    is_class = isinstance(model, type) and issubclass(model, BaseModel)
    fields = settable(model) if is_class else {}
    chosen = next((f" with {tag} {fields[tag].default}" for tag in ("method", "kind", "metric")
                   if tag in fields), "")
    return (f"no such setting{chosen}; {did_you_mean(name, fields)}"
            f"allowed here: {', '.join(fields) or 'nothing'}")


def _locate(location: Sequence[Any], root: type[Settings], data: Any) -> Location:
    """Return where an error is.

    Args:
        location: Pydantic's names of it, among them names of its own for functions and unions.
        root: The class that was validated.
        data: What was validated; it tells the class of settings that may be of several.
    """
    model: Any = root
    path: list[Any] = []
    for part in location:
        if str(part).startswith(("function-", "list[")):
            continue
        classes = tagged(model)
        if part in classes:
            model = classes[part]
            continue
        path.append(part)
        annotation, data = _annotation(model, part), _item(data, part)
        registry = registry_of(annotation)
        if registry is not None:
            name = _item(data, registry.tag) or registry.default
            annotation = registry.get(name) if name in registry.names() else annotation
        model = annotation
    return Location(path, model)


def _annotation(model: Any, part: Any) -> Any:
    """Return the annotation of one part of settings, or None if it is not known."""
    if typing.get_origin(model) is typing.Annotated:
        model = typing.get_args(model)[0]
    annotation: Any = None
    if isinstance(model, type) and issubclass(model, BaseModel):
        fields = settable(model)
        annotation = fields[part].annotation if part in fields else None
    elif typing.get_origin(model) is tuple:
        annotation = typing.get_args(model)[0]
    elif typing.get_origin(model) in (dict, list):
        annotation = typing.get_args(model)[-1]
    if (typing.get_origin(annotation) in (typing.Union, types.UnionType)
            and not tagged(annotation)):
        members = typing.get_args(annotation)
        annotation = next((one for one in members if one is not type(None)), None)
    return annotation


def _item(data: Any, part: Any) -> Any:
    try:
        return data[part]
    except (TypeError, KeyError, IndexError):
        return None
