"""Addresses on the hub: what they mean, what is downloaded for them, and what is said where they cannot be had."""

import pathlib
import sys

import huggingface_hub.constants
import published
import pytest
import small
from hub_server import COMMIT, serving

import cascade_jax as cj
from cascade_jax import bundle, cli, hub, pipeline
from checkpoints_convert import ConvertError, convert, sources


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, pathlib.Path]:
    home = tmp_path_factory.mktemp("hub")
    published.write_folder(home / "checkpoint", published.llamagen_hf(), published.LLAMAGEN_HF_SETTINGS)
    (home / "checkpoint" / "pytorch_model.bin").write_bytes(b"the same weights as a pickle")
    (home / "checkpoint" / "sample.png").write_bytes(b"a picture")
    (home / "files").mkdir()
    published.write_pickle(home / "files" / "vq_ds16_t2i.pt", published.vq(multipliers=(1, 1)), "model")
    (home / "files" / "t2i_XL_stage1_256.pt").write_bytes(b"large")
    small.write_bundle(home / "bundle")
    names = {"owner/LlamaGen-T2I": "checkpoint", "owner/files": "files", "owner/small": "bundle"}
    return {name: home / folder for name, folder in names.items()}


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    forget()
    with serving(repositories, ("main", "refs/pr/1")) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
    forget()


def forget():
    """What another process would not know."""
    for remembered in (hub.weights, hub.whole, hub.only):
        remembered.cache_clear()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hf://owner/name", hub.Address("owner/name")),
        ("hf:/owner/name", hub.Address("owner/name")),  # as pathlib leaves it
        ("hf://models/owner/name", hub.Address("owner/name")),
        ("hf://owner/name@v1.0", hub.Address("owner/name", "v1.0")),
        ("hf://owner/name@refs%2Fpr%2F1/a/b.pt", hub.Address("owner/name", "refs/pr/1", "a/b.pt")),
        ("hf://owner/name/folder/", hub.Address("owner/name", None, "folder")),
    ],
)
def test_addresses_are_spelled_as_on_the_hub(text, meant):
    assert hub.is_address(text)
    assert hub.address(text) == meant
    assert hub.address(str(meant)) == meant


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://@main", "hf:/owner/"])
def test_what_is_no_address_is_said(text):
    with pytest.raises(hub.HubError, match="is no address on the hub: write hf://OWNER/NAME"):
        hub.local(text)


def test_a_path_on_disk_is_itself():
    assert hub.local("models/llamagen") == pathlib.Path("models/llamagen")


def test_a_checkpoint_is_downloaded_once_without_what_no_converter_reads(server, tmp_path):
    opened = sources.open_source("hf://owner/LlamaGen-T2I")
    assert opened.tensors and opened.settings
    assert opened.path == tmp_path / "cache" / "models--owner--LlamaGen-T2I" / "snapshots" / COMMIT
    assert sorted(server.asked) == ["config.json", "model.safetensors"]
    forget()
    sources.open_source("hf://owner/LlamaGen-T2I")
    assert len(server.asked) == 2


def test_a_model_is_converted_from_addresses(server, tmp_path):
    """And its file alone is fetched from a repository of many."""
    config = convert(
        "llamagen", ["hf://owner/LlamaGen-T2I", "hf://owner/files@refs%2Fpr%2F1/vq_ds16_t2i.pt"], tmp_path / "m"
    )
    assert config.target.dim == published.DIM
    assert "t2i_XL_stage1_256.pt" not in server.asked
    assert (tmp_path / "cache" / "models--owner--files" / "refs" / "refs" / "pr" / "1").read_text() == COMMIT


def test_a_converted_model_is_loaded_from_an_address(server, tmp_path, capsys):
    loaded = cj.load("hf://owner/small")
    assert loaded.config == bundle.read_config(server.repositories["owner/small"])
    assert cli.main(["info", "hf://owner/small"]) == 0
    assert "llamagen" in capsys.readouterr().out


def test_a_checkpoint_is_not_fetched_to_be_refused_as_a_model(server):
    with pytest.raises(bundle.BundleError, match="convert it: cascade-jax convert auto hf://owner/LlamaGen-T2I DEST"):
        cj.load("hf://owner/LlamaGen-T2I")
    assert server.asked == ["config.json"]


def test_without_the_hub_the_cache_is_used(server, monkeypatch):
    there = hub.local("hf://owner/LlamaGen-T2I")
    forget()
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")  # nobody listens
    assert hub.local("hf://owner/LlamaGen-T2I") == there
    with pytest.raises(hub.HubError, match="the hub cannot be reached, and the cache does not hold it"):
        hub.local("hf://owner/files")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://owner/nothing", "hf://owner/nothing cannot be had: the hub has no such repository, or it is private"),
        ("hf://owner/files@v9", "hf://owner/files@v9 cannot be had: it has no such revision"),
        ("hf://owner/files/vq.pt", "owner/files has no vq.pt"),
    ],
)
def test_what_cannot_be_had_is_one_line(server, address, said, tmp_path, capsys):
    with pytest.raises(ConvertError, match=said):
        sources.open_source(address)
    assert cli.main(["convert", "auto", address, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if "cascade-jax" in line] == [error.splitlines()[-1]]
    assert said in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_destination_is_a_folder(tmp_path, capsys):
    assert cli.main(["convert", "auto", "vq.pt", "hf://owner/name"]) == 2
    assert "name a folder to write" in capsys.readouterr().err


def test_the_library_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    forget()
    with pytest.raises(bundle.BundleError, match=r"pip install 'cascade_jax\[hub\]'"):
        pipeline.folder("hf://owner/small")
