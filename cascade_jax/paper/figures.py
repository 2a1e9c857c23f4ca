"""Figures of what `traces` and `confidence` find, as matplotlib figures: a step's tree, similarities, maps.

draw_step(trace, 12, bundle).savefig("step.png")
"""

from collections.abc import Sequence

import numpy as np

from cascade_jax.bundle import Bundle
from cascade_jax.paper.confidence import Confidence
from cascade_jax.paper.traces import FIRST, NOT_VISITED, REASONS, REJECTED, SECOND, STRICT, Trace, thresholds
from cascade_jax.paper.traces import sets as sets_of

COLOURS = {NOT_VISITED: "#b4b4b4", REJECTED: "#c0392b", STRICT: "#2a9d4a", FIRST: "#2563eb", SECOND: "#ea7a1c"}
_ROOT, _LEVEL, _HALF = "#222222", 1.75, 0.4  # the root's colour, distance of levels, half a patch's side


def draw_step(trace: Trace, step: int, bundle: Bundle, reach: int = 1):
    """A step's draft tree in the manner of the paper's figure 2, beside the picture it helped to draw.

    Every node shows what its draft would have looked like: the code and `reach` codes around it, decoded with the
    accepted picture. Frames say what became of it; if the rule is CASCADE's, arcs join interchangeable siblings (I),
    and broad lines a node and a converging child (C). Below a node stand r(x) / p(x), and the mass that the rule added.

    Args:
      step: from 0; negative ones count from the last.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: if the trace has no such step.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch

    if not -len(trace) <= step < len(trace):
        raise ValueError(f"step must be between {-len(trace)} and {len(trace) - 1}, not {step}")
    step %= len(trace)
    parents, path = trace.parents[step], trace.path[step]
    nodes = [int(n) for n in np.flatnonzero(trace.tokens[step] >= 0)]
    x, y = _columns(nodes, parents), -_LEVEL * trace.depths[step]
    levels = int(trace.depths[step].max()) + 1
    width = max(x.values()) + 1

    page = Figure(figsize=(3.2 + 0.85 * width, max(3.2, 1.5 * levels + 0.8)), layout="constrained")
    beside, axes = page.subplots(1, 2, width_ratios=(3.2, max(0.85 * width, 2)))
    first = int(trace.position[step])
    _outlined(beside, trace, range(first, first + int(trace.accepted[step]) + 1))
    beside.set_title(f"step {step + 1} of {len(trace)}", fontsize=10)

    known = thresholds(trace.rule) is not None
    alike, converging = sets_of(trace, step) if known else (np.zeros((len(parents),) * 2, bool),) * 2
    for node in nodes[1:]:
        parent = int(parents[node])
        ends = (x[parent], x[node]), (y[parent] - _HALF, y[node] + _HALF)
        if converging[parent, node]:
            axes.plot(*ends, color=COLOURS[SECOND], linewidth=7, alpha=0.35, solid_capstyle="round", zorder=1)
        on_path = node in path
        axes.plot(*ends, color="black" if on_path else "#cccccc", linewidth=2.2 if on_path else 0.9, zorder=2)
    for a, b in zip(*np.nonzero(np.triu(alike))):
        arc = {"arrowstyle": "-", "color": COLOURS[FIRST], "linewidth": 1.1, "linestyle": (0, (3, 2)), "zorder": 3}
        ends = (x[int(a)], y[a] + _HALF), (x[int(b)], y[b] + _HALF)
        axes.add_patch(FancyArrowPatch(*ends, connectionstyle="arc3,rad=-0.35", **arc))
    patches = _patches(trace, step, bundle, nodes, reach)
    for node in nodes:
        _draw_node(axes, trace, step, node, (x[node], y[node]), patches[node])

    handles = [Line2D([], [], color=COLOURS[i], linewidth=3, label=REASONS[i]) for i in COLOURS]
    for handle, label in zip(handles[2:], ("accepted strictly", "accepted by I", "accepted by C")):
        handle.set_label(label)
    if known:
        handles.append(Line2D([], [], color=COLOURS[FIRST], linestyle="--", label="interchangeable"))
        handles.append(Line2D([], [], color=COLOURS[SECOND], linewidth=7, alpha=0.35, label="convergent"))
    page.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    count = int(trace.accepted[step])
    words = f"{count} draft{'' if count == 1 else 's'} accepted; nominal charge {trace.nominal[step]:.2f}, "
    parted = "; the strict decoder would have parted here" if trace.diverged[step] else ""
    axes.set_title(f"{words}coupled {trace.coupled[step]:.2f}{parted}", fontsize=10)
    axes.set(xlim=(-0.7, width - 0.3), ylim=(-_LEVEL * (levels - 1) - 1.25, 0.9), aspect="equal")
    axes.set_axis_off()
    return page


def draw_rows(images: Sequence[np.ndarray], heatmaps: Sequence[np.ndarray], rows: Sequence[int] | None = None):
    """Similarity within rows of pictures, next to the pictures (the paper's figure 3).

    Args:
      images: uint8 [B] of [height, width, 3].
      heatmaps: of each, [H, W, W]; see `traces.similarity_rows`.
      rows: which rows, from 0; None for three: an upper, a middle and the last one.
    """
    from matplotlib.figure import Figure

    height = len(heatmaps[0])
    rows = (height // 6, height // 2, height - 1) if rows is None else rows
    page = Figure(figsize=(2.6 * (1 + len(rows)) + 0.6, 2.8 * len(images)), layout="constrained")
    table = page.subplots(len(images), 1 + len(rows), squeeze=False)
    for line, image, own in zip(table, images, heatmaps):
        side = len(image) / height
        line[0].imshow(image)
        line[0].set_axis_off()
        for number, (axes, row) in enumerate(zip(line[1:], rows)):
            _frame(line[0], -0.5, row * side - 0.5, image.shape[1], side, f"C{number}")
            heat = _heatmap(axes, own[row])
            axes.set_title(f"row {row + 1}", color=f"C{number}", fontsize=10)
    page.colorbar(heat, ax=table, label="cosine similarity", shrink=0.7)
    return page


def draw_sequences(images: Sequence[np.ndarray], full: Sequence[np.ndarray], heatmaps: Sequence[np.ndarray]):
    """Similarity of all positions and within the last row, next to the pictures (the paper's figures 9 and 10).

    Args:
      images: uint8 [B] of [height, width, 3].
      full: of each, [H W, H W]; see `traces.similarity`.
      heatmaps: as of `draw_rows`.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(10.4, 3.4 * len(images)), layout="constrained")
    table = page.subplots(len(images), 3, squeeze=False)
    for (picture, whole, last), image, every, own in zip(table, images, full, heatmaps):
        picture.imshow(image)
        _frame(picture, -0.5, len(image) * (1 - 1 / len(own)) - 0.5, image.shape[1], len(image) / len(own), "C0")
        picture.set_axis_off()
        heat = _heatmap(whole, every)
        whole.set_title("full sequence", fontsize=10)
        _heatmap(last, own[-1])
        last.set_title("last row", color="C0", fontsize=10)
    page.colorbar(heat, ax=table, label="cosine similarity", shrink=0.7)
    return page


def draw_confidence(found: Confidence, images: np.ndarray, places: np.ndarray, codes: int, shown: int = 3):
    """Histograms of entropy and top-1 probability, and maps of both beside the first pictures (the paper's figure 8).

    Args:
      found: over B pictures.
      images: uint8 [B, height, width, 3].
      places: see `traces.places`.
      codes: size of the codebook, whose logarithm is the largest entropy.
      shown: how many pictures.
    """
    from matplotlib.figure import Figure

    entropy, top1 = found.entropy[:, places], found.top1[:, places]
    shown = min(shown, len(images))
    page = Figure(figsize=(9.6, 2.6 + 2.7 * shown), layout="constrained")
    upper, lower = page.subfigures(2, 1, height_ratios=(2.6, 2.7 * shown))
    kinds = ((entropy, np.log(codes), "entropy (nats)", "viridis"), (top1, 1.0, "top-1 probability", "magma"))
    for axes, (values, most, title, _) in zip(upper.subplots(1, 2), kinds):
        axes.hist(values.ravel(), bins=40, range=(0, most), color="#5b7db1")
        axes.axvline(values.mean(), color="black", linestyle="--", linewidth=1)
        axes.set(xlabel=title, yticks=(), title=f"mean {values.mean():.2f}")
        axes.spines[["top", "right", "left"]].set_visible(False)
    table = lower.subplots(shown, 3, squeeze=False)
    for number, line in enumerate(table):
        line[0].imshow(images[number])
        line[0].set_axis_off()
        for axes, (values, most, title, colours) in zip(line[1:], kinds):
            heat = axes.imshow(values[number], vmin=0, vmax=most, cmap=colours)
            axes.set_axis_off()
            lower.colorbar(heat, ax=axes, label=title if number == 0 else None, shrink=0.8)
    return page


def draw_map(image: np.ndarray, values: np.ndarray, title: str = "", most: float | None = None):
    """A picture, and the picture in grey under a map of values [H, W], such as `traces.relaxation_map`'s.

    Args:
      most: the value of the strongest colour; None for the largest.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(7.2, 3.3), layout="constrained")
    plain, under = page.subplots(1, 2)
    plain.imshow(image)
    under.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    most = float(values.max()) or 1.0 if most is None else most
    heat = under.imshow(values, extent=extent, vmin=0, vmax=most, cmap="inferno", alpha=0.65)
    page.colorbar(heat, ax=under, label=title, shrink=0.85)
    for axes in (plain, under):
        axes.set_axis_off()
    return page


def _heatmap(axes, values: np.ndarray):
    drawn = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set(xticks=(), yticks=())
    return drawn


def _frame(axes, left: float, top: float, width: float, height: float, colour: str, **style) -> None:
    from matplotlib.patches import Rectangle

    style = {"linewidth": 1.6, **style}
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, **style))


def _columns(nodes: Sequence[int], parents: np.ndarray) -> dict[int, float]:
    """Every node's place from left to right: leaves side by side, others above the middle of their children."""
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in nodes[1:]:
        children[int(parents[node])].append(node)
    x: dict[int, float] = {}
    leaves = 0

    def place(node):
        nonlocal leaves
        for child in children[node]:
            place(child)
        if children[node]:
            x[node] = (x[children[node][0]] + x[children[node][-1]]) / 2
        else:
            x[node], leaves = float(leaves), leaves + 1

    place(0)
    return x


def _outlined(axes, trace: Trace, positions: range) -> None:
    """The picture, with frames around the codes at these places of the output."""
    side = len(trace.image) / len(trace.places)
    axes.imshow(trace.image)
    axes.set_axis_off()
    for number, position in enumerate(positions):
        colour = "black" if number == len(positions) - 1 else "white"
        for row, column in np.argwhere(trace.places == position):
            _frame(axes, column * side - 0.5, row * side - 0.5, side, side, colour)


def _patches(trace: Trace, step: int, bundle: Bundle, nodes: Sequence[int], reach: int) -> dict[int, np.ndarray | None]:
    """What each node's draft would have looked like; None for drafts that are no code of the picture."""
    found: dict[int, np.ndarray | None] = {}
    side, length = len(trace.image) // len(trace.places), len(trace.output)
    for node in nodes:
        output, above = trace.output.copy(), node
        place = int(trace.position[step] + trace.depths[step, node]) - 1
        while above > 0:
            at = int(trace.position[step] + trace.depths[step, above]) - 1
            if at < length:
                output[at] = trace.tokens[step, above]
            above = int(trace.parents[step, above])
        spot = np.argwhere(trace.places == place)
        found[node] = None
        if len(spot):
            row, column = spot[0]
            padded = np.pad(bundle.images(output[None])[0], ((reach * side,) * 2, (reach * side,) * 2, (0, 0)), "edge")
            size = (2 * reach + 1) * side
            found[node] = padded[row * side : row * side + size, column * side : column * side + size]
    return found


def _draw_node(axes, trace: Trace, step: int, node: int, middle: tuple[float, float], patch) -> None:
    x, y = middle
    reason = int(trace.reason[step, node])
    colour = COLOURS[reason] if node else _ROOT
    if patch is not None:
        axes.imshow(patch, extent=(x - _HALF, x + _HALF, y - _HALF, y + _HALF), zorder=4)
    thickness = 2.6 if reason != NOT_VISITED or not node else 1.2
    _frame(axes, x - _HALF, y - _HALF, 2 * _HALF, 2 * _HALF, colour, linewidth=thickness, zorder=5)
    if not node:
        return
    text = f"{_short(trace.target[step, node])} / {_short(trace.draft[step, node])}"
    if trace.gained[step, node] > 0:
        text += f"\n+{_short(trace.gained[step, node])}"
    style = {"ha": "center", "va": "top", "fontsize": 6.5, "color": "#8a8a8a" if reason == NOT_VISITED else colour}
    paper = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8}
    axes.text(x, y - _HALF - 0.08, text, zorder=6, linespacing=1.1, bbox=paper, **style)


def _short(value: float) -> str:
    """A probability in at most five letters."""
    text = f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
    return text.lstrip("0") or "0" if value < 1 else text
