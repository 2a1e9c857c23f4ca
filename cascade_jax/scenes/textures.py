"""What scenes are painted with: photographs of grounds, film grain, and fractal noise.

Photographs need scikit-image, for its CC0 ones of grass, gravel and brick.
"""

import functools

import numpy as np


@functools.cache
def photographs() -> dict[str, list[np.ndarray]]:
    """Each ground's photograph as a pyramid: float32 planes of 512, 256, 128 and 64 pixels.

    Every photograph is freed of its large shadows and brought to mean 0 and standard deviation 1.
    """
    from skimage import data

    def pyramid(grey):
        grey = grey.astype(np.float32)
        grey = grey - _blur(grey, 64)
        levels = [grey / grey.std()]
        while len(levels) < 4:
            last = levels[-1]
            levels.append((last[::2, ::2] + last[1::2, ::2] + last[::2, 1::2] + last[1::2, 1::2]) / 4)
        return levels

    # The brick photograph was taken at a slant, its courses widening by 0.091 % a row: straighten it.
    brick, columns = data.brick(), np.arange(512)
    widths = (1 + 0.00091 * columns) / (1 + 0.00091 * 511)
    brick = np.stack([np.interp(232 + (columns - 232) * width, columns, row) for width, row in zip(widths, brick)])
    gravel = data.gravel().astype(np.float32)
    return {
        "grass": pyramid(data.grass()),
        "gravel": pyramid(gravel),
        "brick": pyramid(brick.T),
        "sand": pyramid(0.3 * gravel + 0.7 * _blur(gravel, 2)),
    }


@functools.cache
def film_grain() -> np.ndarray:
    """Film grain, float32 [3, 512, 512]: white noise, most of it common to the channels; deviation about 1.2."""
    noise = np.random.default_rng(1).standard_normal((4, 512, 512), np.float32)
    return noise[:1] + 0.6 * noise[1:]


@functools.cache
def _noise_bank() -> np.ndarray:
    """Periodic fractal noise, float32 [8, 256, 256], mean 0 and standard deviation 1; amplitude falls as 1 / f^1.4."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None]) * 256
    amplitude = np.where(frequency > 0, 1 / np.maximum(frequency, 2.0) ** 1.4, 0)
    white = np.fft.rfft2(np.random.default_rng(0).standard_normal((8, 256, 256)))
    fields = np.fft.irfft2(white * amplitude, s=(256, 256))
    return (fields / fields.std((1, 2), keepdims=True)).astype(np.float32)


def noise(rng, height, width, step_y, step_x):
    """A random window of the noise bank, float32 [height, width], read every (step_y, step_x) texels."""
    field = _noise_bank()[rng.integers(8)]
    y = rng.uniform(0, 256) + step_y * np.arange(height)
    x = rng.uniform(0, 256) + step_x * np.arange(width)
    yi, xi = np.floor(y).astype(int), np.floor(x).astype(int)
    fy, fx = (y - yi).astype(np.float32)[:, None], (x - xi).astype(np.float32)
    rows = field[yi % 256] * (1 - fy) + field[(yi + 1) % 256] * fy
    return rows[:, xi % 256] * (1 - fx) + rows[:, (xi + 1) % 256] * fx


def bilinear(plane, y, x):
    """Reads a plane between its pixels at y [h, 1] and x [h, w], all at least one pixel inside its far edges."""
    yi, xi = y.astype(np.int32), x.astype(np.int32)
    fy, fx = (y - yi).astype(np.float32), (x - xi).astype(np.float32)
    flat, corner = plane.ravel(), yi * len(plane) + xi
    upper = flat[corner]
    upper += (flat[corner + 1] - upper) * fx
    corner += len(plane)
    lower = flat[corner]
    lower += (flat[corner + 1] - lower) * fx
    return upper + (lower - upper) * fy


def _blur(grey, width):
    """A Gaussian blur of about `width` pixels with reflected borders, by Fourier transform."""
    tiled = np.pad(grey, ((0, len(grey)), (0, len(grey))), "symmetric")
    frequency = np.hypot(np.fft.fftfreq(len(tiled))[:, None], np.fft.rfftfreq(len(tiled))[None])
    kernel = np.exp(-2 * (np.pi * width * frequency) ** 2)
    return np.fft.irfft2(np.fft.rfft2(tiled) * kernel, s=tiled.shape)[: len(grey), : len(grey)].astype(np.float32)
