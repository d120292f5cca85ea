"""Settings, metrics and names as plain values that every tracker accepts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsFloat

from pydantic import BaseModel

from impactx.run.tracker import MAX_KEY


def flatten(params: Mapping[str, object]) -> dict[str, str]:
    """Return nested settings as one level of texts: {"a": {"b": [1, 2]}} gives {"a.b": "[1, 2]"}.

    Nothing is left out. A list of plain values stays one text; the items of a list that holds
    mappings or lists get their position as name. Pydantic models are dumped first.

    Raises:
        ValueError: Two values get the same name, as in `{"a.b": 1, "a": {"b": 2}}`.
    """
    flat: dict[str, str] = {}
    for key, value in _leaves("", params):
        name = clean_key(key)
        if name in flat:
            raise ValueError(
                f"two parameters have the name {name!r}: {flat[name]} and {_text(value)}")
        flat[name] = _text(value)
    return flat


def _leaves(prefix: str, value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    items: Iterable[tuple[object, object]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(
            isinstance(v, (Mapping, list, tuple, BaseModel)) for v in value):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    if not value and prefix:
        yield prefix, value
    for key, inner in items:
        yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value), ensure_ascii=False, default=str)
    return str(value)


def clean_key(key: str) -> str:
    """Return a name that MLflow accepts for a parameter, metric or tag; `key` itself if it can be.

    Foreign characters become "_" and long names are cut, with a short hash of the whole name behind
    them, so that two names never become one.
    """
    clean = re.sub(r"[^\w.\-/ :]", "_", key)
    clean = "/".join(part for part in clean.split("/") if part.strip(".")) or "_"
    if clean == key and len(key) <= MAX_KEY:
        return key
    return f"{clean[:MAX_KEY - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def numbers(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Return metrics as plain floats under clean names; numpy and torch scalars are welcome.

    Raises:
        TypeError: A value is not a number.
    """
    values = {}
    for key, value in metrics.items():
        try:
            values[clean_key(str(key))] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"the metric {key!r} is not a number: {value!r}") from error
    return values


def epochs(history: Sequence[Mapping[str, float]]) -> list[tuple[int, dict[str, float]]]:
    """Return a history as (step, metrics) pairs.

    Row i is step i + 1, or its own "epoch" where it has one.
    """
    return [(int(row.get("epoch", i + 1)), numbers({k: v for k, v in row.items() if k != "epoch"}))
            for i, row in enumerate(history)]
