"""Which files the converter takes a checkpoint to be, and what their places and names tell it."""

import json
import os
import pathlib
import shutil

import numpy as np
import published
import pytest
from safetensors.numpy import save_file

from cascade_jax import bundle
from checkpoints_convert import ConvertError, convert, families, folders, llamagen, sources
from checkpoints_convert.convert import planned
from checkpoints_convert.formats import Known

KNOWN = Known({}, pixels=64)
REVISION = "9c512ab7d0a1b2c3d4e5f60718293a4b5c6d7e8f"
SMALL_VQ = {"multipliers": (1, 1)}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """Everything that is published for LlamaGen, small."""
    home = tmp_path_factory.mktemp("downloads")
    published.write_pickle(home / "t2i_XL_stage1_256.pt", published.llamagen(), "model", steps=3)
    published.write_pickle(home / "vq_ds16_t2i.pt", published.vq(**SMALL_VQ), "model")
    published.write_folder(home / "hf", published.llamagen_hf(), published.LLAMAGEN_HF_SETTINGS)
    published.write_folder(home / "flan-t5-xl", published.t5(), published.T5_SETTINGS)
    published.write_tokenizer(home / "flan-t5-xl" / "tokenizer.json")
    return home


def cached(hub: pathlib.Path, repository: str, folder: pathlib.Path, revision: str = REVISION) -> pathlib.Path:
    """A repository in the hub's cache: links from a snapshot to blobs that have digests for names."""
    place = hub / f"models--{repository.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = place / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = place / "blobs" / f"{revision[:8]}{i:056x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(revision)
    return place


def dims(path: pathlib.Path) -> int:
    """The width of the LlamaGen in the Hugging Face layout that a path leads to."""
    return planned(llamagen.HUGGING_FACE, sources.open_source(path), KNOWN).config.dim


def test_a_repository_in_the_hubs_cache_is_its_snapshot(home, tmp_path):
    place = cached(tmp_path, "jadohu/LlamaGen-T2I", home / "hf")
    snapshot = place / "snapshots" / REVISION
    assert dims(place) == published.DIM and sources.open_source(place).path == snapshot
    other = cached(tmp_path, "jadohu/LlamaGen-T2I", home / "flan-t5-xl", "0" * 40)  # main, and the newer one
    assert sources.open_source(other).path.name == "0" * 40
    (place / "refs" / "main").unlink()
    with pytest.raises(ConvertError, match=r"has snapshots 0{40}, 9c5.*: name the folder of one"):
        sources.open_source(place)
    shutil.rmtree(place / "snapshots" / ("0" * 40))
    assert sources.open_source(place).path == snapshot
    shutil.rmtree(snapshot)
    with pytest.raises(ConvertError, match="has no snapshot"):
        sources.open_source(place)


def test_a_blob_is_the_file_that_links_to_it(home, tmp_path):
    place = cached(tmp_path, "jadohu/LlamaGen-T2I", home / "hf")
    weights = (place / "snapshots" / REVISION / "model.safetensors").resolve()
    source = sources.open_source(weights)
    assert source.path.name == "model.safetensors" and source.settings["block_size"] == published.TOKENS
    shutil.rmtree(place / "snapshots")
    assert sources.open_source(weights).tensors.keys() == source.tensors.keys()  # by what is in it
    pickled = shutil.copy(home / "t2i_XL_stage1_256.pt", tmp_path / "4d7a214614ab2935")
    assert planned(llamagen.ORIGINAL, sources.open_source(pickled), KNOWN).config.dim == published.DIM


def test_a_name_tells_a_size_only_as_a_word_and_a_revision_tells_none(tmp_path):
    sizes = (256, 384, 512, 768, 1024)
    told = {
        "Lumina-mGPT-7B-768": 768, "t2i_XL_stage1_256.pt": 256, "c2i_B_384.pt": 384, "lumina_512px": 512,
        "x-1024x1024-sft": 1024, "lumina-768-omni": 768, "9c512ab7d0": None, "step5120": None, "256-to-512": None,
        "Lumina-mGPT-7B": None,
    }  # fmt: skip
    for name, size in told.items():
        assert folders.number_in_name(tmp_path / name, sizes) == size, name
    snapshot = tmp_path / "hub" / "models--Alpha-VLLM--Lumina-mGPT-7B-768" / "snapshots" / "512abc"
    snapshot.mkdir(parents=True)
    assert folders.number_in_name(snapshot, sizes) == 768
    assert folders.number_in_name(snapshot / "model.safetensors", sizes) == 768
    (tmp_path / "current").symlink_to(snapshot)
    assert folders.number_in_name(tmp_path / "current", sizes) == 768


def test_the_nearest_name_tells_the_family(tmp_path):
    known = ["lumina-mgpt", "anole"]
    from checkpoints_convert.parts import _named

    for path, family in (
        ("anole/models--Alpha-VLLM--Lumina-mGPT-7B-768/snapshots/abc", ["lumina-mgpt"]),
        ("lumina-mgpt/anole/models/7b", ["anole"]),
        ("weights", []),
    ):
        assert _named(sources.Source(pathlib.Path("/") / path, (), {}, {}), known) == family


def shard(folder: pathlib.Path, *, pickled: bool = False, skip: tuple[int, ...] = ()) -> pathlib.Path:
    """Three shards of a LlamaGen in the Hugging Face layout, without an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published.LLAMAGEN_HF_SETTINGS))
    tensors = list(published.llamagen_hf().items())
    for i in range(3):
        part = dict(tensors[i::3])
        if i + 1 in skip:
            continue
        if pickled:
            published.write_pickle(folder / f"pytorch_model-{i + 1:05d}-of-00003.bin", part)
        else:
            save_file(part, folder / f"model-{i + 1:05d}-of-00003.safetensors")
    return folder


def test_complete_shards_of_either_kind_are_read_where_the_others_are_not(tmp_path):
    folder = published.write_folder(tmp_path / "hf", published.llamagen_hf(), published.LLAMAGEN_HF_SETTINGS, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"lacks model-00002-of-00003\.safetensors, which model\."):
        sources.open_source(folder)
    shard(folder, pickled=True)
    tensors = published.llamagen_hf()
    where = {name: f"pytorch_model-{i % 3 + 1:05d}-of-00003.bin" for i, name in enumerate(tensors)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    source = sources.open_source(folder)
    assert {file.suffix for file in source.files} == {".bin"} and source.tensors.keys() == tensors.keys()
    assert "lacks model-00002-of-00003.safetensors" in source.notes[0] and "is read instead" in source.notes[0]
    (folder / "pytorch_model.bin.index.json").unlink()
    assert {file.suffix for file in sources.open_source(folder).files} == {".bin"}
    save_file(tensors, folder / "model.safetensors")
    assert [file.name for file in sources.open_source(folder).files] == ["model.safetensors"]


def test_shards_without_an_index_are_counted_and_what_training_left_is_not_one(tmp_path):
    folder = shard(tmp_path / "hf", pickled=True)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt"):
        (folder / name).write_bytes(b"\x80\x04N.")
    assert dims(folder) == published.DIM
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    (folder / "pytorch_model-00003-of-00003.bin").unlink()
    lost = "lacks pytorch_model-00002-of-00003.bin, pytorch_model-00003-of-00003.bin: download them too"
    with pytest.raises(ConvertError, match=lost):
        sources.open_source(folder)
    published.write_pickle(folder / "vqgan.ckpt", published.vq(**SMALL_VQ))  # is not taken for the model
    with pytest.raises(ConvertError, match=lost):
        sources.open_source(folder)


def test_a_shard_or_an_index_stands_for_its_folder(home, tmp_path):
    folder = shard(tmp_path / "hf")
    assert dims(folder / "model-00002-of-00003.safetensors") == published.DIM
    files = [*sorted(folder.glob("model-*")), home / "vq_ds16_t2i.pt"]  # as a shell writes out model-*
    assert [source.path for source in sources.open_sources(files)] == [folder, home / "vq_ds16_t2i.pt"]
    indexed = published.write_folder(tmp_path / "two", published.llamagen_hf(), {}, shards=2)
    assert sources.open_source(indexed / "model.safetensors.index.json").path == indexed


def test_parts_of_one_model_that_lie_on_several_devices_are_refused(tmp_path):
    for i in range(2):
        published.write_pickle(tmp_path / f"consolidated.{i:02d}.pth", {"norm.weight": np.ones(3, np.float32)})
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        with pytest.raises(ConvertError, match=r"split for 2 devices \(consolidated.00.pth, consolidated.01.pth\)"):
            sources.open_source(path)


def parts_of(paths: list[pathlib.Path]) -> dict[str, str]:
    """The name of the file or folder that every part is read from."""
    from checkpoints_convert.parts import parts

    found = parts(families.FAMILIES["llamagen"], sources.open_sources(paths), 16, lambda _: None)
    return {name: part.source.path.name for name, part in found.items()}


def test_a_folder_may_hold_the_model_and_its_picture_tokenizer(home, tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    for name in ("t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt"):
        shutil.copy(home / name, loose)
    both = {"vq": "vq_ds16_t2i.pt", "target": "t2i_XL_stage1_256.pt"}
    assert parts_of([loose]) == both
    beside = tmp_path / "beside"
    shutil.copytree(home / "hf", beside)
    settings = {key: value for key, value in published.LLAMAGEN_HF_SETTINGS.items() if key != "block_size"}
    (beside / "config.json").write_text(json.dumps(settings))
    (beside / "notes.pt").write_text("not a checkpoint")
    shutil.copy(home / "vq_ds16_t2i.pt", beside)
    assert parts_of([beside]) == {"vq": "vq_ds16_t2i.pt", "target": "beside"}
    below = tmp_path / "below"
    shutil.copytree(loose, below / "weights" / "stage1")
    assert parts_of([below]) == both
    nested = tmp_path / "nested"
    (nested / "tokenizer").mkdir(parents=True)
    shutil.copy(home / "t2i_XL_stage1_256.pt", nested)
    shutil.copy(home / "vq_ds16_t2i.pt", nested / "tokenizer")
    assert parts_of([nested]) == {"vq": "tokenizer", "target": "nested"}


def test_of_two_models_in_a_folder_neither_is_chosen(home, tmp_path):
    for name in ("t2i_XL_stage1_256.pt", "t2i_XL_stage2_512.pt"):
        shutil.copy(home / "t2i_XL_stage1_256.pt", tmp_path / name)
    shutil.copy(home / "vq_ds16_t2i.pt", tmp_path)
    with pytest.raises(ConvertError, match="are both a target: name the one that you want"):
        parts_of([tmp_path])
    published.write_pickle(tmp_path / "unknown.pt", {"x": np.ones(3, np.float32)})
    with pytest.raises(ConvertError, match=r"holds several checkpoints \(.*\): name the files that you want"):
        parts_of([tmp_path])


def test_files_of_one_model_that_do_not_say_so_are_still_joined(tmp_path):
    tensors = list(published.llamagen().items())
    save_file(dict(tensors[:8]), tmp_path / "first.safetensors")
    save_file(dict(tensors[8:]), tmp_path / "second.safetensors")
    assert planned(llamagen.ORIGINAL, sources.open_source(tmp_path), KNOWN).config.layers == published.LAYERS


def test_files_of_the_same_name_are_told_apart_in_the_origin(home, tmp_path):
    vq = tmp_path / "vq" / "model.safetensors"
    vq.parent.mkdir()
    save_file(published.vq(**SMALL_VQ), vq)
    settings = published.LLAMAGEN_HF_SETTINGS | {"block_size": 256}
    model = published.write_folder(tmp_path / "hf", published.llamagen_hf(), settings)
    convert("llamagen", [model, vq], tmp_path / "out")
    with pytest.raises(ConvertError, match="out is a converted model already: name what was downloaded"):
        convert("llamagen", [tmp_path / "out", vq], tmp_path / "again")
    assert set(bundle.read_config(tmp_path / "out").origin["files"]) == {"hf/model.safetensors", "vq/model.safetensors"}


def test_a_download_is_never_taken_for_the_destination(home, tmp_path):
    """It has a config.json, as a model has, and comes last where the destination was forgotten."""
    model = pathlib.Path(shutil.copytree(home / "hf", tmp_path / "hf"))
    with pytest.raises(ConvertError, match="is there already and is no model: give another destination"):
        convert("llamagen", [home / "t2i_XL_stage1_256.pt", home / "vq_ds16_t2i.pt"], model, pixels=64)
    assert (model / "model.safetensors").is_file()
