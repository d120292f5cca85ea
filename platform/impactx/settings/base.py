"""The base class of all settings, and the types of values that several of them share."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic.fields import FieldInfo

from impactx.settings.masker import read_masker

T = TypeVar("T")
RANGE_LIMIT = 10_000  # values of a range; more is a mistake in its step


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def expand_range(value: Any) -> Any:
    """Return the list of values that a range stands for.

    Args:
        value: A mapping {start, stop, step} of finite numbers. Anything else is returned as it is.

    Returns:
        start, start + step, and so on, as floats that are rounded to 12 digits. stop is among them
        if a step meets it.

    Raises:
        ValueError: The mapping is no range, its step is not above 0, or it has too many values.
    """
    if not isinstance(value, dict):
        return value
    if (set(value) != {"start", "stop", "step"}
            or not all(isinstance(v, (int, float)) for v in value.values())):
        raise ValueError("a range has exactly the numbers start, stop and step")
    start, stop, step = (float(value[key]) for key in ("start", "stop", "step"))
    if not step > 0 or not all(map(math.isfinite, (start, stop, step))):
        raise ValueError("the step of a range must be above 0, its ends finite")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > RANGE_LIMIT:
        raise ValueError(f"a range of {count} values: at most {RANGE_LIMIT}")
    # Rounded: 0.2 + 2 * 0.2 must be 0.6, or the same point has two fingerprints.
    return [round(start + i * step, 12) for i in range(count)]


def unique(values: list[T]) -> list[T]:
    """Return the list as it is.

    Raises:
        ValueError: It holds a value twice.
    """
    if len(set(values)) != len(values):
        raise ValueError("holds a value twice")
    return values


def _unique_numbers(values: Any) -> Any:
    """Check a list of numbers with `unique`; what is none is left for pydantic to refuse."""
    if isinstance(values, list) and all(isinstance(one, (int, float)) for one in values):
        return unique(values)
    return values


def _colour_as_text(value: Any) -> Any:
    """Return the text of a masker that is written as a number or a list of numbers.

    0.5 stands for '0.5', and [0.5, 0.4, 0.3] for '0.5,0.4,0.3'.
    """
    if isinstance(value, (list, tuple)) and value:
        parts = [_colour_as_text(item) for item in value]
        return ",".join(parts) if all(isinstance(p, str) for p in parts) else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    return value


def _readable_masker(value: str) -> str:
    """Return the text of a masker as it is, since it belongs to fingerprints.

    Raises:
        MaskerError: The text describes no masker.
    """
    read_masker(value)
    return value


def settable(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a class of settings by the names under which a user sets them.

    Args:
        model: The class.

    Returns:
        Each field by its alias, or by its own name if it has no alias.
    """
    return {info.alias or name: info for name, info in model.model_fields.items()}


# An axis of a grid, such as Axis[LearningRate]: a list of distinct values, or a range
# {start, stop, step} that stands for one.
Axis = Annotated[list[T], BeforeValidator(expand_range), Field(min_length=1),
                 BeforeValidator(_unique_numbers)]
MaskerName = Annotated[str, BeforeValidator(_colour_as_text), AfterValidator(_readable_masker)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["float32", "tf32", "bfloat16"]
# A name from which the names of files are made: on every file system a single name, never a path.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
Lambda = Annotated[float, Field(ge=0, allow_inf_nan=False)]
