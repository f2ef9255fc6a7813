"""Figures of reports: labelled grids as Pillow images; line charts and confusion matrices as SVG.

All have a transparent ground and use mid greys, or the text colour of the page, so that they can be read on light and dark.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GREY = (128, 128, 128, 255)
RED = (217, 72, 60, 255)
PALETTE = ("#3b82c4", "#d9772b", "#3f9b5b", "#9467bd", "#c94f6d", "#8c8c40", "#2aa1a8", "#7f7f7f")


def grid(
    images: np.ndarray,
    columns: int,
    words: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    wrong: Sequence[bool] | None = None,
    tile: int = 80,
) -> Any:
    """uint8 images [n, H, W, 1 or 3] as one Pillow image (RGBA), row by row, enlarged without smoothing.

    Args:
      columns: images in a row.
      words: a word below each image, or a sentence, which is broken into lines and takes wider images.
      rows: a word at the left of each row.
      wrong: which words to write in red.
      tile: the smallest width of an image, in pixels; sizes are meant for a screen with two pixels per unit.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = np.asarray(images)
    longest = max(map(len, words if words is not None else ()), default=0)
    sentences = longest > 16
    scale = max(1, -(-max(tile, 200 if sentences else 13 * longest) // images.shape[2]))
    height, width = images.shape[1] * scale, images.shape[2] * scale
    if sentences:
        words = [textwrap.fill(text, width // 13, break_long_words=False) for text in words]
    text_lines = max((text.count("\n") + 1 for text in words), default=1) if words is not None else 0
    font = ImageFont.load_default(size=24)
    gap, below, left = 8, 30 * text_lines, max([44, *(round(font.getlength(name)) + 16 for name in rows)]) if rows is not None else 0
    lines = -(-len(images) // columns)
    sheet = Image.new("RGBA", (left + columns * (width + gap) - gap, lines * (height + below + gap) - gap), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = left + i % columns * (width + gap), i // columns * (height + below + gap)
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        sheet.paste(picture.convert("RGBA").resize((width, height), Image.Resampling.NEAREST), (x, y))
        if words is not None:
            colour = RED if wrong is not None and wrong[i] else GREY
            draw.text((x + width / 2, y + height + 2), words[i], fill=colour, font=font, anchor="ma", align="center")
        if rows is not None and i % columns == 0:
            draw.text((left / 2 - 4, y + height / 2), rows[i // columns], fill=GREY, font=font, anchor="mm")
    return sheet


def matrix(counts: np.ndarray, names: Sequence[str], row: str, column: str) -> str:
    """A confusion matrix [K, K] as SVG: counts in cells, shaded by their share of the row (errors in the second colour)."""
    counts, cell, margin = np.asarray(counts), 38, 58
    size = cell * len(names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    parts = []
    for i, j in np.ndindex(counts.shape):
        x, y = margin + j * cell, margin + i * cell
        # A single error must be seen: shading follows the root of the share.
        colour, opacity = PALETTE[0] if i == j else PALETTE[1], 0.15 + 0.65 * math.sqrt(share[i, j])
        fill = f'fill="{colour}" fill-opacity="{opacity:.2f}"' if counts[i, j] else 'fill="currentColor" fill-opacity="0.04"'
        parts.append(f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" rx="3" {fill}/>')
        if counts[i, j]:
            parts.append(label(x + cell / 2 - 1, y + cell / 2 + 4, str(counts[i, j])))
    for i, name in enumerate(names):
        parts.append(label(margin + i * cell + cell / 2 - 1, margin - 9, name, dim=True))
        parts.append(label(margin - 12, margin + i * cell + cell / 2 + 4, name, dim=True))
    parts.append(label(margin + size / 2, 18, column, dim=True))
    parts.append(f'<g transform="translate(16 {margin + size / 2}) rotate(-90)">{label(0, 0, row, dim=True)}</g>')
    return svg(margin + size + 2, margin + size + 2, parts)


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], width: int = 640, height: int = 280) -> str:
    """Curves name -> (x, y) as an SVG line chart, with a logarithmic y axis if all values are positive and span a factor of 20."""
    curves = {name: _binned(x, y) for name, (x, y) in curves.items()}
    curves = {name: (x, y) for name, (x, y) in curves.items() if len(x)}
    if not curves:
        return ""
    xs, ys = (np.concatenate([curve[k] for curve in curves.values()]) for k in (0, 1))
    log = bool(ys.min() > 0 and ys.max() > 20 * ys.min())
    left, right, top, bottom = 62, 14, 12, 30 + 20 * -(-len(curves) // 3)
    low, high, ticks = _log_axis(ys) if log else _axis(ys)
    x_low, x_high, x_ticks = _axis(xs, tight=True)

    def place(x, y):
        u, v = (np.asarray(x) - x_low) / (x_high - x_low), ((np.log10(y) if log else np.asarray(y)) - low) / (high - low)
        return left + u * (width - left - right), height - bottom - v * (height - top - bottom)

    parts = []
    for tick in ticks:
        value = 10.0**tick if log else tick
        y = float(place(x_low, value)[1])
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-opacity="0.12"/>')
        parts.append(label(left - 8, y + 4, f"{value:.4g}", dim=True, anchor="end"))
    for tick in x_ticks:
        x = float(place(tick, 1.0 if log else low)[0])
        parts.append(label(x, height - bottom + 18, f"{tick:,.0f}", dim=True))
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*place(x, y)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>')
        if len(x) == 1:
            a, b = place(x[0], y[0])
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
        key_x, key_y = left + i % 3 * (width - left - right) / 3, height - bottom + 38 + 20 * (i // 3)
        parts.append(f'<rect x="{key_x:.0f}" y="{key_y - 9}" width="10" height="10" rx="2" fill="{colour}"/>')
        parts.append(label(key_x + 16, key_y, f"{name}  {y[-1]:.4g}", anchor="start"))
    return svg(width, height, parts)


def _binned(x, y, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Finite points only, in the order of x; above `most` of them, averages over equal numbers of neighbours."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[keep], kind="stable")
    x, y = x[keep][order], y[keep][order]
    if len(x) <= most:
        return x, y
    return tuple(np.array([part.mean() for part in np.array_split(values, most)]) for values in (x, y))


def _axis(values, tight: bool = False) -> tuple[float, float, list[float]]:
    """Limits and some four to eight round ticks for the values."""
    low, high = float(np.min(values)), float(np.max(values))
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(1e-3, abs(low)), high + 0.5 * max(1e-3, abs(high))
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 7)
    first, last = (math.ceil(low / step), math.floor(high / step)) if tight else (math.floor(low / step), math.ceil(high / step))
    ticks = [i * step for i in range(first, last + 1)]
    return (low, high, ticks) if tight else (ticks[0], ticks[-1], ticks)


def _log_axis(values) -> tuple[float, float, list[float]]:
    """The same in log10: ticks at 1, 2, 5 times powers of ten, beyond three decades at the powers alone."""
    low, high = float(np.log10(np.min(values))), float(np.log10(np.max(values)))
    multiples = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [k + math.log10(m) for k in range(math.floor(low), math.ceil(high) + 1) for m in multiples]
    first, last = max(i for i, t in enumerate(ticks) if t <= low + 1e-9), min(i for i, t in enumerate(ticks) if t >= high - 1e-9)
    return ticks[first], ticks[last], ticks[first : last + 1]


def label(x: float, y: float, text: str, dim: bool = False, anchor: str = "middle") -> str:
    """A line of text in an SVG, in the colour of the page."""
    opacity = ' fill-opacity="0.65"' if dim else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{opacity}>{html.escape(text)}</text>'


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """An SVG of the given size from its parts."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="13">{"".join(parts)}</svg>'
    )
