"""How the report draws: in colours that survive printing and colour blindness.

Figures are drawn without matplotlib's global state.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

SURFACE = "cividis"  # of heat maps: even in lightness, the same for red-green colour-blind readers
INK, SOFT, LINE = "#1b1f24", "#57606a", "#d0d7de"
# Okabe and Ito's colours, each with its own marker and dash: colour alone distinguishes nothing.
_LOOKS: list[tuple[str, str, Any]] = [
    ("#0072B2", "o", "-"), ("#E69F00", "s", "--"), ("#D55E00", "^", "-."), ("#009E73", "D", ":"),
    ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))), ("#56B4E9", "P", (0, (3, 1))),
    ("#000000", "X", (0, (1, 1))), ("#009E73", "<", "--"), ("#D55E00", ">", ":"),
    ("#0072B2", "p", "-."), ("#E69F00", "*", ":")]
_BASELINE: tuple[str, str, Any] = ("#57606a", "o", (0, (6, 2)))
_ORDER = ["impactx", "lambda0", "shuffled", "abn", "shuffled_in_class", "wae", "mean_map"]
DPI = 160
NAMES = {
    "baseline": "A (baseline)", "impactx": "IMPACTX", "lambda0": "control λ = 0", "abn": "ABN",
    "wae": "WAE", "shuffled": "control: shuffled maps",
    "shuffled_in_class": "control: shuffled in class", "mean_map": "control: mean map",
    "class_mean_map": "control: class-mean map", "ensemble": "ensemble of two A",
    "integrated_gradients": "IMPACTX on integrated gradients",
    "single_stage": "IMPACTX, single stage"}


def shown(approach: str) -> str:
    """Return the name of an approach for readers."""
    return NAMES.get(approach, approach)


def look(approach: str, approaches: Sequence[str]) -> dict[str, Any]:
    """Return the colour, marker and line style of an approach.

    Args:
        approach: The approach; a built-in one looks the same in every figure.
        approaches: All approaches of the figure.
    """
    if approach == "baseline":
        return _as_arguments(_BASELINE)
    others = [name for name in approaches if name != "baseline" and name not in _ORDER]
    index = (_ORDER.index(approach) if approach in _ORDER
             else len(_ORDER) + others.index(approach))
    return _as_arguments(_LOOKS[index % len(_LOOKS)])


def looks(number: int) -> list[dict[str, Any]]:
    """Return the colours, markers and line styles of lines that stand for no approach."""
    return [_as_arguments(one) for one in itertools.islice(itertools.cycle(_LOOKS), number)]


def _as_arguments(one: tuple[str, str, Any]) -> dict[str, Any]:
    return dict(zip(("color", "marker", "linestyle"), one, strict=True))


def figure(width: float, height: float) -> Any:
    """Return an empty figure.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


def plain(axes: Any, *, grid: str | None = None) -> None:
    """Give axes the look of the report: without lines at the top and on the right.

    Args:
        axes: Of matplotlib.
        grid: "x", "y", "both" or None.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.xaxis.label.set_size(9.5)
    axes.yaxis.label.set_size(9.5)
    axes.title.set_size(10.5)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LINE, linewidth=0.7)


def png(drawing: Any) -> bytes:
    """Return a figure as PNG."""
    stream = io.BytesIO()
    # Without the Software entry, the same report has the same bytes for any matplotlib version.
    drawing.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()
