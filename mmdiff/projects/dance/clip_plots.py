"""Clips of music as SVG: waveforms, onsets, spectra, beats, and the dance above them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np

from mmdiff.evals.plots import PALETTE, label, svg


def music(
    rows: Mapping[str, tuple[np.ndarray, Sequence[float]]],
    rate: int,
    beats: Sequence[float] = (),
    motion: np.ndarray | None = None,
    parents: Sequence[int] = (),
    width: int = 640,
) -> str:
    """Clips of music as SVG, each with its waveform, its onsets as dots, its spectrum below, and lines at the beats that all should have.

    Args:
      rows: name -> (samples [n] in [-1, 1], onsets in seconds).
      rate: samples a second.
      beats: in seconds.
      motion: joints [frames, joints, 3] in metres, y up, of a dance that lasts as long: stick figures above the music.
      parents: every joint's parent, -1 for none.
    """
    left, right, wave, spectrum, gap = 114, 6, 56, 64, 14
    top = 84 if motion is not None else 4
    inner, height = width - left - right, top + len(rows) * (wave + spectrum + gap)
    seconds = max(len(samples) for samples, _ in rows.values()) / rate

    def x(second):
        return left + inner * second / seconds

    parts = _stick_figures(motion, parents, left, inner, top - 8) if motion is not None else []
    for i, (name, (samples, onsets)) in enumerate(rows.items()):
        y = top + i * (wave + spectrum + gap)
        middle, columns = y + 8 + (wave - 8) / 2, np.array_split(np.asarray(samples, np.float64), inner)
        outline = [(left + k, middle - (wave - 8) / 2 * column.max()) for k, column in enumerate(columns)]
        outline += [(left + k, middle - (wave - 8) / 2 * column.min()) for k, column in reversed(list(enumerate(columns)))]
        points = " ".join(f"{a:.0f},{b:.1f}" for a, b in outline)
        parts.append(f'<polygon points="{points}" fill="{PALETTE[0]}" stroke="{PALETTE[0]}" stroke-width="0.6"/>')
        parts.append(_spectrogram(samples, left, y + wave + 2, inner, spectrum - 2))
        parts += [f'<circle cx="{x(second):.1f}" cy="{y + 3}" r="3" fill="{PALETTE[1]}"/>' for second in onsets]
        parts.append(label(left - 10, middle + 4, name, anchor="end"))
    parts += [
        f'<line x1="{x(beat):.1f}" x2="{x(beat):.1f}" y1="{top}" y2="{height - gap}" stroke="currentColor" stroke-opacity="0.5" '
        'stroke-dasharray="3 3"/>'
        for beat in beats
    ]
    return svg(width, height, parts)


def _stick_figures(motion: np.ndarray, parents: Sequence[int], left: float, width: float, height: float, count: int = 8) -> list[str]:
    """Stick figures from the front, at even times."""
    frames = np.asarray(motion, np.float64)[((np.arange(count) + 0.5) / count * len(motion)).astype(int)]
    flat = frames[..., :2] - frames[:, :1, :2].mean(1, keepdims=True) * np.array([1, 0])  # each in its own place
    scale = height / max(np.ptp(flat[..., 1]), 1e-6)
    parts = []
    for k, joints in enumerate(flat):
        points = np.stack([left + (k + 0.5) / count * width + scale * joints[:, 0], scale * (flat[..., 1].max() - joints[:, 1])], -1)
        bones = "".join(
            f"M{points[parent][0]:.1f},{points[parent][1]:.1f}L{points[child][0]:.1f},{points[child][1]:.1f}"
            for child, parent in enumerate(parents)
            if parent >= 0
        )
        parts.append(f'<path d="{bones}" fill="none" stroke="currentColor" stroke-opacity="0.75" stroke-width="1.6"/>')
    return parts


def _spectrogram(samples: np.ndarray, x: float, y: float, width: float, height: float, size: int = 512) -> str:
    """The magnitudes of short spectra as an image in an SVG, low tones at the bottom, from nothing at -60 dB to full colour."""
    from PIL import Image

    padded = np.pad(np.asarray(samples, np.float64), size // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 4] * np.hanning(size)
    power = np.abs(np.fft.rfft(windows)).T[: size // 4] ** 2  # the lower half has what the ear needs
    levels = np.clip(1 + np.log10(power / max(power.max(), 1e-12) + 1e-12) / 6, 0, 1)[::-1]
    colour = np.array([int(PALETTE[3][k : k + 2], 16) for k in (1, 3, 5)])
    pixels = np.concatenate([np.broadcast_to(colour, (*levels.shape, 3)), 255 * levels[..., None]], -1)
    data = io.BytesIO()
    Image.fromarray(np.rint(pixels).astype(np.uint8), "RGBA").save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return f'<image href="{source}" x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
