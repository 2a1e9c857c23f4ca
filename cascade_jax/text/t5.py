"""Captions to T5 features, as LlamaGen was trained: cleaned, tokenised, encoded, padded on the left.

The cleaning is DeepFloyd's, by way of PixArt and LlamaGen's `language/t5.py`; it is applied twice there too.
"""

import functools
import html
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax.bundle import BundleError, Prompt

SLOTS = 120
_INSTALL = "reading captions needs {}: pip install 'cascade_jax[text]'"

_ENDINGS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)

# What is replaced, in order, before HTML is taken out, ...
_BEFORE = [
    ("<person>", "person"),
    *[
        (rf"\b((?:{start}:(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_ENDINGS})[\w/-]*\b\/?(?!@)))", "")
        for start in ("https?", "www")
    ],
]
# ... between that and the repair of broken encodings, ...
_BETWEEN = [
    (r"@[\w\d]+\b", ""),  # nicknames
    (f"[{_CJK}]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\/\*]{1,}", " "),
    (r"\s+\.\s+", " "),
]
# ... and after it.
_AFTER = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]


def clean(caption: str) -> str:
    """A caption as LlamaGen's text encoder saw it in training: cleaned twice."""
    return _cleaned(_cleaned(caption))


def _cleaned(caption: str) -> str:
    try:
        import ftfy
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise BundleError(_INSTALL.format("ftfy and beautifulsoup4")) from error
    import warnings

    caption = _replaced(urllib.parse.unquote_plus(caption).strip().lower(), _BEFORE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Beautiful Soup wonders at captions that look like file names
        caption = BeautifulSoup(caption, features="html.parser").text
    caption = _replaced(caption, _BETWEEN)
    if len(re.findall(r"[-_]", caption)) > 3:  # this-is-my-cute-cat
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _replaced(caption, _AFTER).strip()


def _replaced(text: str, replacements: Sequence[tuple[str, str]]) -> str:
    for pattern, by in replacements:
        text = re.sub(pattern, by, text)
    return text


def reader(
    encoder: nnx.Module | Callable, tokenizer: str | os.PathLike, slots: int = SLOTS
) -> Callable[[Sequence[str]], list[Prompt]]:
    """A function from captions to encoded prompts.

    Args:
      encoder: a `models.t5.T5Encoder`, or whatever else maps ids int [B, C] and their mask to features.
      tokenizer: T5's tokenizer.json; where there is none, the spiece.model beside it is read.
      slots: features of a caption; longer captions are cut.

    The function raises a BundleError where the tokenizer library or the file is missing.
    """
    encode = functools.partial(_encode, *nnx.split(encoder)) if isinstance(encoder, nnx.Module) else encoder
    words = functools.cache(lambda: _tokenizer(pathlib.Path(tokenizer), slots))

    def read(captions: Sequence[str]) -> list[Prompt]:
        ids = np.zeros((len(captions), slots), np.int32)  # 0 is T5's padding
        mask = np.zeros((len(captions), slots), bool)
        for row, caption in enumerate(captions):
            found = words()(clean(caption))
            ids[row, : len(found)], mask[row, : len(found)] = found, True
        features = encode(jnp.asarray(ids), jnp.asarray(mask))
        return [left_padded(f, m) for f, m in zip(features, mask)]

    return read


def _tokenizer(file: pathlib.Path, slots: int) -> Callable[[str], list[int]]:
    """From text to at most `slots` ids, the last the end's, by tokenizer.json or the spiece.model beside it."""
    if not file.is_file() and (trained := file.with_name("spiece.model")).is_file():
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise BundleError(_INSTALL.format("the sentencepiece library")) from error
        pieces = SentencePieceProcessor(model_file=str(trained))
        return lambda text: [*pieces.encode(text)[: slots - 1], pieces.eos_id()]
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BundleError(_INSTALL.format("the tokenizers library")) from error
    if not file.is_file():
        raise BundleError(
            f"the text encoder lacks its tokenizer, {file}: convert it with its tokenizer.json or spiece.model"
        )
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(slots)
    return lambda text: tokenizer.encode(text).ids


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoder: nnx.GraphDef, state: nnx.State, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(encoder, state)(ids, mask)


def left_padded(features: jax.Array, mask: np.ndarray) -> Prompt:
    """Features [C, d] with the padding behind, as a prompt with the padding in front, where it is zero."""
    behind = int(len(mask) - mask.sum())
    kept = jnp.where(jnp.asarray(mask)[:, None], features, 0)
    return Prompt(features=jnp.roll(kept, behind, axis=0), mask=jnp.roll(jnp.asarray(mask), behind))
