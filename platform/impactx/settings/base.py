"""What the settings' classes are made of: types and grid axes."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic.fields import FieldInfo

from impactx.settings.masker import read_masker


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def expand_range(value: Any) -> Any:
    """Turn {start, stop, step} into the list of its values, the end included if a step meets it."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"start", "stop", "step"} or not all(isinstance(v, (int, float)) for v in value.values()):
        raise ValueError("a range has exactly the numbers start, stop and step")
    start, stop, step = (float(value[key]) for key in ("start", "stop", "step"))
    if not step > 0 or not all(map(math.isfinite, (start, stop, step))):
        raise ValueError("the step of a range must be above 0, its ends finite")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > 10_000:
        raise ValueError(f"a range of {count} values: at most 10000")
    # Rounded to 12 digits: 0.2 + 2 * 0.2 must be 0.6, or the same point gets two fingerprints.
    return [round(start + i * step, 12) for i in range(count)]


def unique(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError("holds a value twice")
    return values


def axis(item: Any) -> Any:
    """A grid axis: a list of distinct values, or {start, stop, step} for an arithmetic range."""
    return Annotated[list[item], BeforeValidator(expand_range), Field(min_length=1), BeforeValidator(
        lambda v: unique(v) if isinstance(v, list) and all(isinstance(i, (int, float)) for i in v) else v)]


def _colour_as_text(value: Any) -> Any:
    """0.5 and [0.5, 0.4, 0.3] may be written for '0.5' and '0.5,0.4,0.3'."""
    if isinstance(value, (list, tuple)) and value:
        parts = [_colour_as_text(item) for item in value]
        return ",".join(parts) if all(isinstance(p, str) for p in parts) else value
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _readable_masker(value: str) -> str:
    """The text as it is (it belongs to fingerprints). Raises MaskerError for what is no masker."""
    read_masker(value)
    return value


def settable(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a class of settings by the names under which they are set: a field's alias, where it has one."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


MaskerName = Annotated[str, BeforeValidator(_colour_as_text), AfterValidator(_readable_masker)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["float32", "tf32", "bfloat16"]
Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)]
