"""A sheet of examples as PNG: image, map, and the map over the image, with one scale for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLOURS = "RdBu_r"  # blue below zero, white at zero, red above
CLIPPED = 99.5  # percentile of the absolute values that gets the strongest colour


class SheetError(RuntimeError):
    """The sheet cannot be drawn or written; the message says what to do."""


def colour_limit(maps: np.ndarray) -> float:
    """Where the colours end: the 99.5th percentile of the absolute values of maps (N, C, H, W) summed over C."""
    values = np.abs(np.asarray(maps, np.float64).sum(1))
    return float(np.percentile(values, CLIPPED)) or float(values.max()) or 1.0


def check_sheet(path: str | Path) -> None:
    """Raise SheetError where no sheet can be drawn, or none can be written to `path`."""
    try:
        import matplotlib  # noqa: F401 - a second, for those who ask for a sheet
    except ImportError as error:
        raise SheetError("a sheet needs matplotlib, which is not installed: pip install 'impactx[explain]'"
                                 ) from error
    target = Path(path)
    if target.suffix != ".png" or not target.absolute().parent.is_dir():
        raise SheetError(f"the sheet {path}: give a .png file in a folder that exists")


def draw_sheet(path: str | Path, images: np.ndarray, maps: np.ndarray, names: Sequence[str], *,
               title: str = "", limit: float | None = None) -> None:
    """Draw N examples, two a row.

    images: uint8 (N, H, W, 3); maps: float32 (N, C, H, W), summed over their channels; names: N class names.
    Red speaks for the class, blue against it; the scale is the same for all, symmetric around zero, and ends at
    `limit`, by default `colour_limit` of these maps. Raises SheetError where matplotlib is not installed or the
    file cannot be written.
    """
    check_sheet(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    if not len(images) == len(maps) == len(names) or not len(images):
        raise ValueError(f"{len(images)} images, {len(maps)} maps and {len(names)} names: the same number is needed")
    values = np.asarray(maps, np.float64).sum(1)
    limit = limit or colour_limit(maps)
    scale, across = Normalize(-limit, limit), min(2, len(images))
    rows = math.ceil(len(images) / across)
    figure = Figure(figsize=(5.5 * across, 1.75 * rows + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 4 * across - 1, squeeze=False,
                             gridspec_kw={"width_ratios": [1, 1, 1, 0.15, 1, 1, 1][:4 * across - 1]})
    for panel in panels.flat:
        panel.set_axis_off()
    for i, (image, value, name) in enumerate(zip(images, values, names, strict=True)):
        column = i % across * 4
        first, second, third = panels[i // across, column:column + 3]
        first.imshow(image, interpolation="nearest")
        second.imshow(value, cmap=COLOURS, norm=scale, interpolation="nearest")
        grey = image.mean(2) / 255 * 0.7 + 0.3
        third.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        third.imshow(value, cmap=COLOURS, norm=scale, interpolation="nearest",
                     alpha=np.clip(np.abs(value) / limit, 0, 1) ** 0.5 * 0.85)
        first.set_title(name if len(name) <= 24 else name[:23] + "…", fontsize=9)
        if i < across:
            second.set_title("map", fontsize=9, color="0.4")
            third.set_title("overlay", fontsize=9, color="0.4")
    bar = figure.colorbar(ScalarMappable(scale, COLOURS), ax=panels.ravel().tolist(), location="bottom", aspect=60,
                          shrink=0.6, pad=0.02, extend="both" if np.abs(values).max() > limit else "neither")
    bar.set_label("against the class  <  value, summed over channels  <  for the class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise SheetError(f"the sheet {path} cannot be written: {error}") from error
