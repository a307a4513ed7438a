"""Maps HDR frames to the standard range: what ffmpeg does with
`zscale=t=linear:npl=203,tonemap=mobius:peak=4.93,zscale=p=bt709:t=bt709`.

PyAV's ffmpeg has no zscale, and swscale's own mapping takes seconds to set up. Sources: SMPTE ST
2084 (PQ), ITU-R BT.2100 (HLG, with the system gamma of a display of 1,000 cd/m2), BT.2408 (diffuse
white at 203 cd/m2), BT.2087 (primaries), BT.1886 (display gamma), ffmpeg's `vf_tonemap.c` (mobius).
"""

from functools import cache

import av
import numpy as np

PQ, HLG = 16, 18
"""`AVColorTransferCharacteristic` of HDR frames."""
WHITE, PEAK = 203.0, 1000.0
"""Diffuse white, and the brightest that is told apart, in cd/m2."""
KNEE = 0.3
"""Share of diffuse white up to which brightness is kept (ffmpeg's default for mobius)."""
PRIMARIES = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""Linear BT.2020 to BT.709."""


def is_hdr(frame: av.VideoFrame) -> bool:
    return frame.color_trc in (PQ, HLG)


def tone_map(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """Map `(height, width, 3)` uint16 RGB, full range, to uint8 of the same shape, BT.709.

    Args:
        transfer: `PQ` or `HLG`.
    """
    linear = _linear(transfer)[rgb]
    if transfer == HLG:  # Scene light; the display's system gamma applies to luminance.
        luminance = linear @ np.array([0.2627, 0.678, 0.0593], np.float32)
        linear *= (PEAK / WHITE) * np.maximum(luminance, 1e-6)[..., np.newaxis] ** 0.2
    brightest = np.maximum(linear.max(axis=2, keepdims=True), 1e-6)
    linear *= _mobius(brightest) / brightest
    mapped = np.clip(linear @ PRIMARIES.T, 0, 1)
    return _encoded()[(mapped * 65535).astype(np.uint16)]


def _mobius(light: np.ndarray) -> np.ndarray:
    peak = PEAK / WHITE
    a = -KNEE * KNEE * (peak - 1) / (KNEE * KNEE - 2 * KNEE + peak)
    b = (KNEE * KNEE - 2 * KNEE * peak + peak) / (peak - 1)
    scale = (b * b + 2 * b * KNEE + KNEE * KNEE) / (b - a)
    return np.where(light <= KNEE, light, scale * (light + a) / (light + b))


@cache
def _linear(transfer: int) -> np.ndarray:
    """`(65536,)` float32: light of each value, PQ relative to diffuse white, HLG to the peak."""
    value = np.arange(65536) / 65535
    if transfer == PQ:
        power = value ** (1 / 78.84375)
        light = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
        return (10000 / WHITE * light ** (1 / 0.1593017578125)).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
    return light.astype(np.float32)


@cache
def _encoded() -> np.ndarray:
    """`(65536,)` uint8: the value that a display of gamma 2.4 shows as each light."""
    return np.rint(255 * (np.arange(65536) / 65535) ** (1 / 2.4)).astype(np.uint8)
