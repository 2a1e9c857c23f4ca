"""How a scene is rendered: sky, ground in perspective, shadows, things, grain.

All randomness comes from the generator that is passed in: the same state gives the same picture. Grounds come from
photographs, skies from fractal noise, and film grain lies over everything, so that a picture's tokens are as ambiguous
as a photograph's.
"""

import dataclasses
import math

import numpy as np

from cascade_jax.scenes.textures import bilinear, film_grain, noise, photographs
from cascade_jax.scenes.world import PIXELS, Scene, Thing


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Renders a complete scene as uint8 [128, 128, 3]; light, tints, textures and exact positions come from `rng`.

    Raises:
      ValueError: if the scene leaves something unsaid.
    """
    return render_and_cover(scene, rng)[0]


def render_and_cover(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As `render`, and how much of each pixel is part of a thing: float32 [128, 128], from 0 to 1."""
    if None in (scene.ground, scene.sky) or any(None in (t.colour, t.size, t.place) for t in scene.things):
        raise ValueError(f"only a complete scene can be rendered, not {scene}")
    light = _unit(rng.uniform(0.35, 0.9) * _sign(rng), -rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.8))
    lamp = rng.uniform(0.93, 1.05) * np.asarray(_LAMPS[scene.sky]) * rng.uniform(0.98, 1.02, 3)
    horizon = rng.uniform(45, 60)
    # Channels first while painting: numpy broadcasts over rows of pixels much faster than over triples.
    picture = _sky(scene.sky, horizon, light, rng)
    _lay_ground(picture, scene.ground, horizon, lamp, rng)
    top, left = rng.integers(0, 512 - PIXELS, 2)
    grain = rng.uniform(0.01, 0.0135) * film_grain()[:, top : top + PIXELS, left : left + PIXELS]
    # What has to do with things comes last: scenes that differ in these alone share everything else.
    solids = _arrange(scene.things, horizon, rng)
    for solid in solids:
        _cast_shadow(picture, solid, light, strength=_SHADOWS[scene.sky])
    covered = np.zeros((PIXELS, PIXELS), np.float32)
    for solid in solids:
        rows, columns, cover = _draw(picture, solid, light, lamp, rng)
        np.maximum(covered[rows, columns], cover, out=covered[rows, columns])
    picture += grain
    picture *= 255
    picture += 0.5
    return np.ascontiguousarray(np.clip(picture, 0, 255, out=picture).astype(np.uint8).transpose(1, 2, 0)), covered


_LAMPS = {"clear": (1.04, 1.02, 0.98), "cloudy": (0.94, 0.96, 1.0), "sunset": (1.02, 0.90, 0.82)}

_SHADOWS = {"clear": 0.62, "cloudy": 0.42, "sunset": 0.55}

# Dark, middle and light tone of each ground.
_GROUND_TONES = {
    "grass": ((0.08, 0.17, 0.04), (0.30, 0.46, 0.13), (0.66, 0.74, 0.36)),
    "gravel": ((0.14, 0.14, 0.16), (0.46, 0.46, 0.47), (0.80, 0.79, 0.77)),
    "brick": ((0.30, 0.11, 0.08), (0.58, 0.27, 0.19), (0.80, 0.70, 0.62)),
    "sand": ((0.58, 0.45, 0.28), (0.82, 0.69, 0.47), (0.95, 0.86, 0.66)),
}

# Photograph pixels per picture pixel at the lower edge.
_GROUND_SCALES = {"grass": (0.9, 1.6), "gravel": (1.0, 1.7), "brick": (1.7, 2.8), "sand": (1.8, 2.6)}

_COLOUR_TONES = {
    "red": (0.84, 0.13, 0.11),
    "yellow": (0.98, 0.81, 0.12),
    "green": (0.10, 0.62, 0.24),
    "blue": (0.12, 0.32, 0.86),
    "purple": (0.55, 0.20, 0.70),
    "white": (0.95, 0.95, 0.94),
}

# Zenith and horizon of the sky, light and shaded side of its clouds.
_SKY_TONES = {
    "clear": ((0.22, 0.47, 0.86), (0.70, 0.85, 0.97), (0.97, 0.98, 1.0), (0.90, 0.94, 0.99)),
    "cloudy": ((0.50, 0.56, 0.63), (0.72, 0.75, 0.79), (0.90, 0.91, 0.93), (0.47, 0.50, 0.56)),
    "sunset": ((0.33, 0.25, 0.50), (0.99, 0.62, 0.27), (0.99, 0.56, 0.42), (0.56, 0.30, 0.45)),
}


def _sky(kind, horizon, light, rng):
    """The picture with its sky down to a little below the horizon, float32 [3, 128, 128]."""
    tint = rng.uniform(0.95, 1.05, 3) * rng.uniform(0.97, 1.03)
    zenith, rim, bright, shade = (_channels(t * tint) for t in np.asarray(_SKY_TONES[kind]))
    height = int(horizon) + 5
    fall = np.clip(np.arange(height, dtype=np.float32) / horizon, 0, 1) ** rng.uniform(0.7, 1.5)
    tilt = rng.uniform(-0.12, 0.12) * np.linspace(-1, 1, PIXELS, dtype=np.float32)
    sky = zenith + (rim - zenith) * np.clip(fall[:, None] + tilt, 0, 1)

    step = rng.uniform(0.8, 1.5)
    field = noise(rng, height + 3, PIXELS + 3, 1.9 * step, step)
    low, high, most = {"clear": (0.4, 1.7, 0.6), "cloudy": (-1.2, 0.9, 0.9), "sunset": (-0.5, 0.9, 0.75)}[kind]
    # Clouds are lit from above: the field's slope tells which side of a billow faces the light.
    field, lower, upper = field[:-3, :-3], field[3:, 3:], field[3:, :-3]
    slope = field - (lower if light[0] < 0 else upper)
    cover = most * _smoothstep((field - low - rng.uniform(-0.2, 0.2)) / (high - low))
    cloud = shade + (bright - shade) * np.clip(0.55 - 0.7 * slope, 0, 1)
    sky += (cloud - sky) * cover
    picture = np.empty((3, PIXELS, PIXELS), np.float32)
    picture[:, :height] = sky
    return picture


def _lay_ground(picture, kind, horizon, lamp, rng):
    """Paints the ground below a slightly tilted horizon, in perspective."""
    columns = np.arange(PIXELS, dtype=np.float32) - PIXELS / 2
    edge = horizon + rng.uniform(-0.025, 0.025) * columns
    top = int(edge.min()) - 1
    depth = np.arange(top, PIXELS) - top

    # Texels per pixel shrink towards the viewer; rows advance by their own scale, squeezed as seen from a low camera.
    near = rng.uniform(*_GROUND_SCALES[kind])
    far = min(near * rng.uniform(2.0, 3.0), 3.8)
    scale = 1 / (1 / far + (1 / near - 1 / far) * depth / depth[-1])
    v = np.cumsum(scale**1.4)
    v += rng.uniform(0, 496 - v[-1])
    u = _sign(rng) * columns * scale[:, None].astype(np.float32)
    u += rng.uniform(64 * far, 496 - 64 * far)
    level = np.round(np.log2(scale) - 0.1).astype(int)
    texture = np.empty((len(depth), PIXELS), np.float32)
    for which, plane in enumerate(photographs()[kind]):
        rows = level == which
        if rows.any():
            texture[rows] = bilinear(plane, v[rows, None] / 2**which, u[rows] / 2**which)

    # Light and dark patches larger than the photograph's detail.
    patches = noise(rng, len(depth), PIXELS, 1.6, 0.8)
    contrast = rng.uniform(0.38, 0.52) * (0.55 if kind == "sand" else 1.0)
    tone = contrast * texture + 0.22 * patches + rng.uniform(-0.15, 0.1)
    tint = lamp * rng.uniform(0.94, 1.06, 3)
    steps = np.linspace(-1, 1, 256)
    ramp = [np.interp(steps, (-1, 0, 1), channel) for channel in np.transpose(_GROUND_TONES[kind] * tint)]
    shades = np.clip(tone * 128 + 128, 0, 255).astype(np.uint8)
    ground = np.take(np.asarray(ramp, np.float32), shades, axis=1)
    haze = 0.35 * np.exp(-depth / 7.0).astype(np.float32)[:, None]
    ground += (picture[:, top - 1].mean(1)[:, None, None] - ground) * haze
    seam = int(edge.max()) + 2 - top
    cover = np.clip(np.arange(top, top + seam, dtype=np.float32)[:, None] - edge + 0.5, 0, 1)
    above = picture[:, top : top + seam]
    above += (ground[:, :seam] - above) * cover
    picture[:, top + seam :] = ground[:, seam:]


@dataclasses.dataclass(frozen=True)
class _Solid:
    """A thing with its place in the picture: centre of its lowest point (x, y) and radius, in pixels."""

    thing: Thing
    x: float
    y: float
    radius: float


def _arrange(things, horizon, rng):
    """Gives every thing a radius and a foot on the ground, farthest first; the smaller of close ones gives way."""
    radius = np.array([rng.uniform(15, 18) if thing.size == "small" else rng.uniform(27, 32) for thing in things])
    x = [{"left": 26.0, "middle": 64.0, "right": 102.0}[t.place] + rng.uniform(-5, 5) for t in things]
    foot = [rng.uniform(max(horizon + 26, 84 + 0.3 * r), 111 + 0.3 * r) for r in radius]
    x = np.clip(x, radius - 1, PIXELS + 1 - radius)
    if len(things) == 2:
        mover = int(np.argmin(radius))
        gap = x[mover] - x[1 - mover]
        overlap = radius.sum() - 4 - abs(gap)
        x[mover] += np.sign(gap) * np.clip(overlap, 0, 10)
        x = np.clip(x, radius - 1, PIXELS + 1 - radius)
    solids = [_Solid(*fields) for fields in zip(things, x.tolist(), foot, radius.tolist())]
    return sorted(solids, key=lambda solid: solid.y)


def _cast_shadow(picture, solid, light, strength):
    """Darkens the ground under a solid: a soft ellipse that leans away from the light, darkest at the foot."""
    r = solid.radius
    rows, columns, y, x = _window(solid.x - light[0] * 0.5 * r, solid.y - 0.1 * r, 1.9 * r, 0.7 * r)
    reach = np.hypot(x / (1.45 * r), y / (0.46 * r))
    at_foot = np.hypot((x - light[0] * 0.5 * r) / (0.95 * r), (y + 0.04 * r) / (0.26 * r))
    dark = strength * _smoothstep(1.15 - reach) + 0.4 * _smoothstep(1.1 - at_foot)
    picture[:, rows, columns] *= 1 - np.minimum(dark, 0.85)


def _draw(picture, solid, light, lamp, rng):
    """Draws one solid with shading, a faint surface pattern and anti-aliased edges; returns where, and its cover."""
    r = solid.radius
    rows, columns, y, x = _window(solid.x, solid.y - r, 1.1 * r, 1.1 * r)
    cover, shade, gloss, grain = _SOLIDS[solid.thing.shape](x / r, y / r, r, light, rng)
    strength = rng.uniform(0.03, 0.07)
    if rng.random() < 0.5:
        pattern = np.sin(grain * rng.uniform(10, 16) + rng.uniform(0, 6)).astype(np.float32)
    else:
        pattern = noise(rng, *cover.shape, 4.0, 4.0)
    shade = shade * (1 + strength * pattern)
    tone = np.asarray(_COLOUR_TONES[solid.thing.colour]) * rng.uniform(0.93, 1.05) + rng.uniform(-0.025, 0.025, 3)
    surface = _channels(tone * lamp) * shade + 0.5 * gloss
    region = picture[:, rows, columns]
    region += (surface - region) * cover
    return rows, columns, cover


def _ball(x, y, r, light, rng):
    """A unit ball: cover, shade, gloss and the coordinate along which stripes run, each [h, w]."""
    rho2 = x * x + y * y
    cover = np.clip((1 - np.sqrt(rho2)) * r + 0.5, 0, 1)
    z = np.sqrt(np.maximum(1 - rho2, 0))
    cosine = x * light[0] + y * light[1] + z * light[2]
    # Half-way vector between the light and a viewer straight ahead.
    half = _unit(light[0], light[1], light[2] + 1)
    gloss = np.maximum(x * half[0] + y * half[1] + z * half[2], 0) ** 40
    angle = rng.uniform(0, math.pi)
    return cover, _lit(cosine), gloss, np.arcsin(np.clip(x * math.cos(angle) + y * math.sin(angle), -1, 1))


def _cube(x, y, r, light, rng):
    """A cube turned by a random angle and seen a little from above."""
    turn, pitch = rng.uniform(0.4, 1.17), rng.uniform(0.36, 0.5)
    c, s, cp, sp = math.cos(turn), math.sin(turn), math.cos(pitch), math.sin(pitch)
    half = 0.97 / (c + s)
    # Half edges of the cube in (right, down, towards the viewer): two horizontal ones and the vertical one.
    edges = half * np.array([(c, s * sp, s * cp), (-s, c * sp, c * cp), (0, -cp, sp)], np.float32)
    bottom = half * (cp + (c + s) * sp)
    y = y - (1 - bottom)
    cover = shade = grain = 0
    for face in range(3):
        (ax, ay, _), (bx, by, _) = edges[(face + 1) % 3].tolist(), edges[(face + 2) % 3].tolist()
        determinant = ax * by - ay * bx
        px, py = x - edges[face][0], y - edges[face][1]
        a, b = (px * by - py * bx) / determinant, (py * ax - px * ay) / determinant
        inside = np.minimum((1 - abs(a)) / math.hypot(bx, by), (1 - abs(b)) / math.hypot(ax, ay)) * abs(determinant)
        part = np.clip(inside * r + 0.5, 0, 1)
        cover = cover + part
        shade = shade + part * _lit(edges[face] @ np.float32(light) / np.float32(half))
        grain = grain + part * b
    scale = 1 / np.maximum(cover, 1e-3)
    return np.minimum(cover, 1), shade * scale, np.zeros_like(cover), grain * scale


def _cone(x, y, r, light, rng):
    """An upright cone seen a little from above: its outline is an ellipse and the two tangents from the apex to it."""
    rx, ry, apex = 0.86, 0.2, -1.0
    centre = 1 - ry
    height = centre - apex
    u, v = abs(x) / rx, (y - centre) / ry
    tv = ry / height
    tu = math.sqrt(1 - tv * tv)
    length = np.hypot(u, v) + 1e-6
    round_foot = (1 - length) * length / np.hypot(u / rx, v / ry).clip(1e-6)
    straight_side = (1 - u * tu + v * tv) / math.hypot(tu / rx, tv / ry)
    cover = np.clip(np.where(v < -tv, straight_side, round_foot) * r + 0.5, 0, 1)
    along = (y - apex) / height
    across = np.clip(x / np.maximum(rx * along, 0.02), -1, 1)
    ahead = np.sqrt(1 - across * across)
    lean = _unit(rx, height, 0)
    cosine = lean[1] * (across * light[0] + ahead * light[2]) - lean[0] * light[1]
    gloss = 0.35 * np.exp(-(((across - 0.6 * light[0]) / 0.22) ** 2)) * ahead
    return cover, _lit(cosine), gloss, along * 2 - 0.2 * ahead


_SOLIDS = {"ball": _ball, "cube": _cube, "cone": _cone}


def _lit(cosine):
    """Ambient plus diffuse light; faces turned away keep a little form."""
    return 0.36 + 0.72 * np.maximum(cosine, 0) + 0.12 * np.minimum(cosine, 0)


def _window(x, y, half_width, half_height):
    """Rows, columns and centred coordinates (float32 [h, 1] and [1, w]) of a box clipped to the picture."""
    left, right = max(int(x - half_width), 0), min(int(x + half_width) + 2, PIXELS)
    top, bottom = max(int(y - half_height), 0), min(int(y + half_height) + 2, PIXELS)
    row = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    column = np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - x)
    return slice(top, bottom), slice(left, right), row, column


def _smoothstep(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _sign(rng):
    return 1.0 if rng.random() < 0.5 else -1.0


def _channels(colour):
    """A colour as float32 [3, 1, 1]."""
    return np.asarray(colour, np.float32)[:, None, None]


def _unit(*vector):
    # Plain floats, so that float32 arrays stay float32.
    length = sum(v * v for v in vector) ** 0.5
    return tuple(v / length for v in vector)
