"""Repositories on the Hugging Face hub, by addresses such as hf://OWNER/NAME@REVISION/file.

Nothing is downloaded unless such an address is named. Cache, revisions, tokens, mirrors (HF_ENDPOINT) and offline mode
(HF_HUB_OFFLINE=1) are those of `huggingface_hub`, which is optional.
"""

import dataclasses
import functools
import os
import pathlib
import re
import urllib.parse
from collections.abc import Sequence

# What a model can be made of; pictures, notebooks and weights of other frameworks are left where they are.
PICKLE = ".bin"
ENDINGS = (".json", ".safetensors", PICKLE, ".pt", ".pth", ".ckpt", ".jit", ".model", ".tiktoken", ".txt", ".spm")
# A path that went through pathlib has lost a slash.
_ADDRESS = re.compile(
    r"hf:/{1,2}(?:models/)?(?P<owner>[^/@]+)/(?P<name>[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.*))?"
)


class HubError(ValueError):
    """What an address means cannot be had; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A repository, or a file or a folder in it.

    Attributes:
      repository: OWNER/NAME.
      revision: a branch, a tag or a commit; None for the main branch.
      inside: the path of a file or a folder; empty for the whole.
    """

    repository: str
    revision: str | None = None
    inside: str = ""

    def __str__(self):
        revision = f"@{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repository}{revision}" + (f"/{self.inside}" if self.inside else "")


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is meant to be on the hub."""
    return os.fspath(path).startswith("hf:/")


def address(path: str | os.PathLike) -> Address:
    """What an address names, in the hub's own spelling; a slash in a revision is written %2F.

    Raises:
      HubError: if it is none.
    """
    if (match := _ADDRESS.fullmatch(os.fspath(path))) is None:
        raise HubError(
            f"{os.fspath(path)} is no address on the hub: write hf://OWNER/NAME, hf://OWNER/NAME@REVISION/FILE"
        )
    revision = match["revision"] and urllib.parse.unquote(match["revision"])
    return Address(f"{match['owner']}/{match['name']}", revision, (match["inside"] or "").strip("/"))


def local(path: str | os.PathLike) -> pathlib.Path:
    """Where a path lies on this machine: itself, or what an address names, downloaded unless it is in the hub's cache.

    Raises:
      HubError: if it cannot be had.
    """
    return weights(address(path)) if is_address(path) else pathlib.Path(path)


@functools.cache
def weights(wanted: Address) -> pathlib.Path:
    """A checkpoint as it was published, without what no converter reads: other frameworks' weights, and pickles of what
    is there as safetensors. One revision for the whole process.

    Raises:
      HubError: if it cannot be had, or there is nothing of that name.
    """
    patterns = [wanted.inside, f"{wanted.inside}/*"] if wanted.inside else [f"*{ending}" for ending in ENDINGS]
    place = _downloaded(wanted, patterns, [] if wanted.inside.endswith(PICKLE) else [f"*{PICKLE}"]) / wanted.inside
    if place.is_dir() and not any(place.rglob("*.safetensors")):
        place = _downloaded(wanted, patterns) / wanted.inside
    if not place.exists():
        raise HubError(f"{wanted.repository} has no {wanted.inside}")
    return place


@functools.cache
def whole(wanted: Address) -> pathlib.Path:
    """All files of a repository or of a folder in it, such as a model directory that somebody put on the hub.

    Raises:
      HubError: if they cannot be had.
    """
    return _downloaded(wanted, [f"{wanted.inside}/*" if wanted.inside else "*"]) / wanted.inside


@functools.cache
def only(wanted: Address, name: str) -> pathlib.Path:
    """The folder of `whole`, in which one file is looked for alone.

    Raises:
      HubError: if the repository cannot be had; a file that it lacks is not there.
    """
    return _downloaded(wanted, [f"{wanted.inside}/{name}" if wanted.inside else name]) / wanted.inside


def _downloaded(wanted: Address, allow: Sequence[str], ignore: Sequence[str] = ()) -> pathlib.Path:
    """The folder of a repository's revision in the cache, with at least the files of some patterns."""
    try:
        return pathlib.Path(
            _library().snapshot_download(
                wanted.repository,
                revision=wanted.revision,
                allow_patterns=list(allow),
                ignore_patterns=list(ignore) or None,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )
    except Exception as error:  # of several kinds, some of them the transport's own
        raise HubError(f"{wanted} cannot be had: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The hub's own words, without its advice on how to write programs."""
    known = {
        "RepositoryNotFoundError": "the hub has no such repository, or it is private: log in with hf auth login",
        "GatedRepoError": "its owner wants to be asked first, on its page; then log in with hf auth login",
        "RevisionNotFoundError": "it has no such revision",
        "LocalEntryNotFoundError": "the hub cannot be reached, and the cache does not hold it",
        "IncompleteSnapshotError": "the hub cannot be reached, and the cache holds only a part of it",
    }
    return known.get(type(error).__name__) or " ".join(str(error).split()) or type(error).__name__


def _library():
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError("hf:// addresses need huggingface_hub: pip install 'cascade_jax[hub]'") from error
    return huggingface_hub
