"""The page: contents, markup, style and scripts in one file."""

import dataclasses
import html
import importlib.resources
import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cascade_jax import files, methods, pipeline
from cascade_jax.bundle import Bundle, Prompt
from cascade_jax.methods import Method
from cascade_jax.paper import traces
from cascade_jax.paper.traces import Trace
from cascade_jax.paper.viewer import patches
from cascade_jax.paper.viewer.contents import contents
from cascade_jax.paper.viewer.patches import Patches
from cascade_jax.sampling import Sampling
from cascade_jax.tree import name_of

SCRIPTS = ("data.js", "format.js", "pictures.js", "timeline.js", "tree.js", "walk.js", "main.js")


@dataclasses.dataclass(frozen=True)
class About:
    """What the page says of how a picture was drawn.

    Attributes:
      prompt: the text.
      method: what it was drawn by.
      model: its name.
      seed: and the picture's number with it.
      sampling: the settings that tokens were drawn with.
      command: the command that wrote the page; "" for none.
    """

    prompt: str
    method: Method
    model: str = "scenes"
    seed: int = 0
    number: int = 0
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""


def drawn(
    bundle: Bundle,
    about: About,
    path: str | os.PathLike,
    prompt: str | Prompt | None = None,
    sampling: Sampling | None = None,
    beside: bool | np.ndarray = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trace:
    """Draws the picture that `about` tells of and writes the page of it; the trace.

    Args:
      prompt: the encoded text; None to encode it.
      sampling: checked settings; None for the model's own.
      beside: whether to draw it token by token too, for a method that does not; or that picture.
      progress: called with (what is being done, done so far, how much there is).
    """
    say = lambda what: progress and (lambda done, total: progress(what, done, total))
    method, prompt = about.method, about.prompt if prompt is None else prompt
    seen = traces.of_method(bundle, method, prompt, about.seed, about.number, sampling, say("drawing"))
    cells = patches.cut(seen, bundle.images, say("decoding drafts"))
    other = beside if isinstance(beside, np.ndarray) else None
    if beside is True and method.tree.depth:
        ar = methods.method(methods.AR, bundle, noise=method.drawn["noise"])
        key = pipeline.picture_keys(jax.random.key(about.seed), np.array([about.number]))
        alone = pipeline.generate(
            bundle, [prompt], key, tree=ar.tree, sampling=sampling, progress=say("token by token"), **ar.drawn
        )
        other = alone.images[0]
    write(path, page(seen, cells, about, other))
    return seen


def page(trace: Trace, cells: Patches, about: About, beside: np.ndarray | None = None) -> str:
    """The page's HTML.

    Args:
      cells: what its drafts look like, see `patches.cut`.
      beside: uint8, the picture that the same key draws token by token; None to leave it out.
    """
    method = about.method
    told = {
        "prompt": about.prompt,
        "method": method.name,
        "model": about.model,
        "tree": name_of(method.tree),
        "seed": about.seed,
        "number": about.number,
        "settings": _plain(method.settings),
        "sampling": _plain(about.sampling),
        "command": about.command,
    }
    content = json.dumps({**told, **contents(trace, cells, beside)}, separators=(",", ":"), allow_nan=False)
    folder = importlib.resources.files(__package__) / "page"
    read = lambda name: (folder / name).read_text(encoding="utf-8")
    parts = {
        "title": html.escape(f"{about.prompt}: {method.name}, step by step"),
        "style": read("style.css"),
        "contents": content.replace("<", "\\u003c"),  # no text of it ends the element that holds it
        "script": "\n".join(map(read, SCRIPTS)),
    }
    before, *rest = read("page.html").split("{{")
    return before + "".join(parts[name] + text for name, _, text in (part.partition("}}") for part in rest))


def write(path: str | os.PathLike, document: str) -> None:
    """Writes a page, whole or not at all."""
    with files.whole(path) as temporary:
        temporary.write_text(document, encoding="utf-8")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that JSON can hold: infinity, which some take, is a word."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }
