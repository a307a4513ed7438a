"""Curves of a run as small SVG pictures, in milliseconds: a run's end must not wait for them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

POINTS_SHOWN = 400
"""Of each curve; of more, every second, third, ... is drawn, and the last."""
_WIDTH, _LEFT, _TOP, _BOTTOM, _LINE = 420, 64, 24, 184, 14
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def line_chart(title: str, curves: Mapping[str, Points]) -> str:
    """Draw curves over steps, each in its colour; values that are not finite leave gaps.

    Args:
        title: line above.
        curves: steps and values by name; one finite value at least.
    """
    thin = {name: thinned(points) for name, points in curves.items()}
    finite = [point for points in thin.values() for point in points if math.isfinite(point[1])]
    (left, right), (low, high) = (_range(values) for values in zip(*finite, strict=True))

    def place(point: tuple[float, float]) -> str:
        x = _LEFT + (point[0] - left) / (right - left) * (_WIDTH - _LEFT - 8)
        y = _TOP + (high - point[1]) / (high - low) * (_BOTTOM - _TOP)
        return f"{x:.1f},{y:.1f}"

    height = _BOTTOM + _LINE * (len(thin) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        _text(_LEFT, 14, title, 'font-weight="bold"'),
        f'<path d="M{_LEFT},{_TOP}V{_BOTTOM}H{_WIDTH - 8}" fill="none" stroke="#888"/>',
        _text(_LEFT - 4, 30, f"{high:.4g}", 'text-anchor="end"'),
        _text(_LEFT - 4, _BOTTOM, f"{low:.4g}", 'text-anchor="end"'),
        _text(_LEFT, _BOTTOM + _LINE, f"step {left:g}"),
        _text(_WIDTH - 8, _BOTTOM + _LINE, f"{right:g}", 'text-anchor="end"'),
    ]
    for number, (name, points) in enumerate(thin.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for run in _runs(points):
            corners = " ".join(map(place, run if len(run) > 1 else run * 2))
            parts.append(
                f'<polyline points="{corners}" fill="none" stroke="{colour}" '
                'stroke-width="1.5" stroke-linecap="round"/>'
            )
        parts.append(_text(_LEFT, _BOTTOM + _LINE * (number + 2), name, f'fill="{colour}"'))
    return "".join([*parts, "</svg>"])


def thinned(points: Points) -> Points:
    """Return at most about `POINTS_SHOWN` of the points, evenly chosen, the last among them."""
    if len(points) <= POINTS_SHOWN:
        return points
    return [*points[: -1 : -(-len(points) // POINTS_SHOWN)], points[-1]]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """Cut a curve at values that are not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _text(x: int, y: int, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
