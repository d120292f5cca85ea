"""How the report draws: colours that survive a printer and colour-blindness; matplotlib without global state."""

from __future__ import annotations

import io
import itertools
from typing import Any

SURFACE = "cividis"  # of heat maps: even in lightness, the same for red-green colour-blind readers
INK, SOFT, LINE = "#1b1f24", "#57606a", "#d0d7de"
# Okabe and Ito's colours, each with a marker and a dash of its own: nothing is told by colour alone.
_LOOKS = [("#0072B2", "o", "-"), ("#E69F00", "s", "--"), ("#D55E00", "^", "-."), ("#009E73", "D", ":"),
          ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))), ("#56B4E9", "P", (0, (3, 1))), ("#000000", "X", (0, (1, 1))),
          ("#009E73", "<", "--"), ("#D55E00", ">", ":"), ("#0072B2", "p", "-."), ("#E69F00", "*", ":")]
_BASELINE = ("#57606a", "o", (0, (6, 2)))
_ORDER = ["impactx", "lambda0", "shuffled", "abn", "shuffled_in_class", "wae", "mean_map"]
DPI = 160
NAMES = {"baseline": "A (baseline)", "impactx": "IMPACTX", "lambda0": "control λ = 0", "abn": "ABN", "wae": "WAE",
         "shuffled": "control: shuffled maps", "shuffled_in_class": "control: shuffled in class",
         "mean_map": "control: mean map", "class_mean_map": "control: class-mean map", "ensemble": "ensemble of two A",
         "integrated_gradients": "IMPACTX on integrated gradients",
         "single_stage": "IMPACTX, single stage"}


def shown(approach: str) -> str:
    """An approach's name for readers."""
    return NAMES.get(approach, approach)


def look(approach: str, approaches: list[str]) -> dict[str, Any]:
    """Colour, marker and line style of an approach among those of a figure; the known ones are always the same."""
    if approach == "baseline":
        colour, marker, dash = _BASELINE
    else:
        others = [a for a in approaches if a != "baseline" and a not in _ORDER]
        place = _ORDER.index(approach) if approach in _ORDER else len(_ORDER) + others.index(approach)
        colour, marker, dash = _LOOKS[place % len(_LOOKS)]
    return {"color": colour, "marker": marker, "linestyle": dash}


def looks(number: int) -> list[dict[str, Any]]:
    """Colour, marker and line style of so many lines that no approach stands for."""
    return [{"color": colour, "marker": marker, "linestyle": dash}
            for colour, marker, dash in itertools.islice(itertools.cycle(_LOOKS), number)]


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches; its axes have no upper and right line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def plain(axes: Any, *, grid: str | None = None) -> None:
    """The report's look for one pair of axes. grid: "x", "y", "both" or None."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.xaxis.label.set_size(9.5)
    axes.yaxis.label.set_size(9.5)
    axes.title.set_size(10.5)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LINE, linewidth=0.7)


def png(made: Any) -> bytes:
    """A figure as PNG."""
    stream = io.BytesIO()
    # No Software entry: the same report is the same bytes whatever matplotlib's version says.
    made.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()
