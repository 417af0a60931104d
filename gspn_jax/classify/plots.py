"""Pictures of a comparison: accuracy against images seen, and confusion matrices."""

import pathlib
from typing import Any

import numpy as np

from gspn_jax import extras

NAMED = 50
"""Classes, at the most, whose names stand beside a confusion matrix."""


def check() -> None:
    """Raises MissingExtra where nothing can be drawn."""
    extras.require("plot", "matplotlib", by="drawing")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curve(path: pathlib.Path, results: dict[str, dict[str, Any]]) -> None:
    """Top-1 of the first average (solid) and of the parameters (dashed) against images seen, a colour a mixer."""
    figure = _figure(6.4, 4)
    axes = figure.subplots()
    for number, (mixer, result) in enumerate(results.items()):
        seen = [point["images_seen"] for point in result["curve"]]
        averaged = next((name for name in (result["curve"] or [{}])[0] if name.startswith("top1_ema_")), "top1")
        label = f"{mixer}: {result['top1']:.1f} %"
        axes.plot(seen, [point[averaged] for point in result["curve"]], color=f"C{number}", marker=".", label=label)
        axes.plot(seen, [point["top1"] for point in result["curve"]], "--", color=f"C{number}", linewidth=1)
    axes.set(xlabel="images seen", ylabel="top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(title="solid: average, dashed: parameters")
    figure.savefig(path, dpi=120)


def confusion(path: pathlib.Path, counts: list[list[int]], class_names: list[str], title: str) -> None:
    """Share of each class (row) that is given to each class (column), in percent."""
    shares = 100 * np.asarray(counts) / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    side = 5 if len(class_names) <= 10 else 8
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the class")
    if len(class_names) <= NAMED:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90)
        axes.set_yticks(range(len(class_names)), class_names)
    if len(class_names) <= 10:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="given", ylabel="true", title=title)
    figure.savefig(path, dpi=120)
