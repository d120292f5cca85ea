"""Maskers as text: what may be written, and what it describes.

A masker is what stands in for hidden pixels. `impactx.explain.masking` applies it to images; its
text is read here, so that settings are checked without torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_BLUR = re.compile(r"^\s*blur\s*\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)\s*$")
_CONSTANT = re.compile(r"^\s*(?:constant\s*\((?P<inner>[^()]*)\)|(?P<bare>[^()]*))\s*$")
ALLOWED = (
    "'blur(kw,kh)' with whole numbers of at least 1, or a colour in [0, 1] such as 0.5 or "
    "'constant(0.5,0.4,0.3)'"
)


class MaskerError(ValueError):
    """A masker cannot be read or does not fit the images; the message names value and remedy."""


@dataclass(frozen=True)
class BlurSpec:
    """A box blur.

    Attributes:
        width: Of the kernel, in pixels, at least 1.
        height: Of the kernel, in pixels, at least 1.

    Raises:
        MaskerError: A side is below 1.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            if side < 1:
                raise MaskerError(
                    f"masker {self.name}: a kernel side of {side}; allowed: 1 or more")

    @property
    def name(self) -> str:
        """The masker's text, such as "blur(16,16)"."""
        return f"blur({self.width},{self.height})"


@dataclass(frozen=True)
class ConstantSpec:
    """One colour.

    Attributes:
        colour: One value in [0, 1] for all channels, or one for each channel.

    Raises:
        MaskerError: There is no value, or one lies outside [0, 1].
    """

    colour: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.colour:
            raise MaskerError(f"masker: an empty colour; allowed: {ALLOWED}")
        for value in self.colour:
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise MaskerError(
                    f"masker {self.name}: the value {value} lies outside [0, 1]")

    @property
    def name(self) -> str:
        """The masker's text, such as "constant(0.5,0.4,0.3)"."""
        return f"constant({','.join(format(value, 'g') for value in self.colour)})"


def read_masker(text: str) -> BlurSpec | ConstantSpec:
    """Return the masker that a text describes.

    Args:
        text: Such as "blur(16,16)", "0.5", "0.5,0.4,0.3" or "constant(0.5)".

    Raises:
        MaskerError: The text is not understood, or a value is out of its range.
    """
    blur = _BLUR.match(text)
    if blur:
        return BlurSpec(int(blur.group(1)), int(blur.group(2)))
    constant = _CONSTANT.match(text)
    if constant:
        inner, bare = constant.group("inner", "bare")
        numbers = bare if inner is None else inner
        try:
            return ConstantSpec(tuple(float(number) for number in numbers.split(",")))
        except MaskerError:
            raise
        except ValueError:
            pass
    raise MaskerError(f"masker {text!r} is not understood; allowed: {ALLOWED}")
