"""A sheet of examples as PNG: image, map, and the map over the image, in one scale for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from impactx.models import MapKind

COLOURS = "RdBu_r"  # blue below zero, white at zero, red above
ATTENTION_COLOURS = "viridis"  # from 0, dark, to 1, bright
CLIPPED = 99.5  # percentile of the absolute values that gets the strongest colour


class SheetError(RuntimeError):
    """The sheet cannot be drawn or written; the message says what to do."""


def colour_limit(maps: np.ndarray) -> float:
    """Return where the colours end: the 99.5th percentile of the maps' absolute values.

    Args:
        maps: float32 (N, C, H, W), which are summed over their channels first.
    """
    values = np.abs(np.asarray(maps, np.float64).sum(1))
    return float(np.percentile(values, CLIPPED)) or float(values.max()) or 1.0


def check_sheet(path: str | Path) -> None:
    """Check that a sheet can be drawn, and written to `path`.

    Raises:
        SheetError: matplotlib is not installed, or `path` is no .png file in a folder that exists.
    """
    try:
        import matplotlib  # noqa: F401 - a second, for those who ask for a sheet
    except ImportError as error:
        raise SheetError("a sheet needs matplotlib, which is not installed: pip install "
                         "'impactx[explain]'") from error
    target = Path(path)
    if target.suffix != ".png" or not target.absolute().parent.is_dir():
        raise SheetError(f"the sheet {path}: give a .png file in a folder that exists")


def draw_sheet(path: str | Path, images: np.ndarray, maps: np.ndarray, names: Sequence[str], *,
               title: str = "", limit: float | None = None, kind: MapKind = "evidence") -> None:
    """Draw N examples, two a row.

    Args:
        path: The .png file.
        images: uint8 (N, H, W, 3).
        maps: float32 (N, C, H, W), which are summed over their channels.
        names: N class names.
        title: The sheet's title.
        limit: Where the colours of "evidence" end; by default `colour_limit` of these maps.
        kind: "evidence": red speaks for the class, blue against it, and the scale, which is the
            same for all, is symmetric around zero; "attention", which has no sign: the scale is 0
            to 1.

    Raises:
        SheetError: matplotlib is not installed, or the file cannot be written.
        ValueError: The numbers of images, maps and names differ, or are 0.
    """
    check_sheet(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    if not len(images) == len(maps) == len(names) or not len(images):
        raise ValueError(f"{len(images)} images, {len(maps)} maps and {len(names)} names: the same "
                         "number is needed")
    values = np.asarray(maps, np.float64).sum(1)
    signed = kind == "evidence"
    limit = (limit or colour_limit(maps)) if signed else 1.0
    colours = COLOURS if signed else ATTENTION_COLOURS
    scale = Normalize(-limit, limit) if signed else Normalize(0, 1)
    across = min(2, len(images))
    rows = math.ceil(len(images) / across)
    figure = Figure(figsize=(5.5 * across, 1.75 * rows + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    columns = 4 * across - 1  # three panels an example, and a gap between two examples
    panels = figure.subplots(rows, columns, squeeze=False,
                             gridspec_kw={"width_ratios": [1, 1, 1, 0.15, 1, 1, 1][:columns]})
    for panel in panels.flat:
        panel.set_axis_off()
    for i, (image, value, name) in enumerate(zip(images, values, names, strict=True)):
        column = i % across * 4
        first, second, third = panels[i // across, column:column + 3]
        first.imshow(image, interpolation="nearest")
        second.imshow(value, cmap=colours, norm=scale, interpolation="nearest")
        grey = image.mean(2) / 255 * 0.7 + 0.3
        third.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        third.imshow(value, cmap=colours, norm=scale, interpolation="nearest",
                     alpha=np.clip(np.abs(value) / limit, 0, 1) ** (0.5 if signed else 1) * 0.85)
        # Names are the user's: a $ in one begins no formula.
        first.set_title(name if len(name) <= 24 else name[:23] + "…", fontsize=9, parse_math=False)
        if i < across:
            second.set_title("map" if signed else "attention", fontsize=9, color="0.4")
            third.set_title("overlay", fontsize=9, color="0.4")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=panels.ravel().tolist(),
                          location="bottom", aspect=60, shrink=0.6, pad=0.02,
                          extend="both" if np.abs(values).max() > limit else "neither")
    bar.set_label(
        "against the class  <  value, summed over channels  <  for the class" if signed else
        "attention, without a sign: it speaks neither for the class nor against it", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise SheetError(f"the sheet {path} cannot be written: {error}") from error
