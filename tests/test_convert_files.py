"""What the converter finds in files: weights, damage, other things, and numbers that no model can be made of."""

import json
import os
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np
import published
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from cascade_jax import bundle, cli
from checkpoints_convert import ConvertError, convert, families, llamagen, sources
from checkpoints_convert.convert import planned, recognise
from checkpoints_convert.formats import Known
from checkpoints_convert.parts import fitted

KNOWN = Known({}, pixels=64)


def _planned(path: pathlib.Path):
    return planned(llamagen.ORIGINAL, sources.open_source(path), KNOWN)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    home = tmp_path_factory.mktemp("downloads")
    published.write_pickle(home / "vq_ds16_t2i.pt", published.vq(), "model")
    published.write_folder(home / "flan-t5-xl", published.t5(), published.T5_SETTINGS, shards=2)
    published.write_tokenizer(home / "flan-t5-xl" / "tokenizer.json")
    return home


@pytest.mark.parametrize("nest", ["model", "module", "state_dict", None])
def test_weights_are_found_under_the_names_of_training_scripts(nest, tmp_path):
    import argparse

    beside = {"args": argparse.Namespace(lr=1e-4), "optimizer": {"x": torch.zeros(1)}} if nest else {}
    part = _planned(published.write_pickle(tmp_path / "x.pt", published.llamagen(), nest, **beside))
    assert part.config.image_tokens == 16


def test_wrapped_models_names_are_unwrapped(tmp_path):
    wrapped = {f"_orig_mod.{name}": value for name, value in published.llamagen().items()}
    assert _planned(published.write_pickle(tmp_path / "x.pt", wrapped, "model")).config.dim == published.DIM


def test_bfloat16_survives_both_kinds_of_files(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    save_file({"x": value}, tmp_path / "x.safetensors")
    torch.save({"x": torch.arange(6).reshape(2, 3).bfloat16()}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        tensor = sources.open_source(tmp_path / name).tensors["x"]
        assert tensor.dtype == value.dtype
        np.testing.assert_array_equal(tensor.read(), value)


@pytest.mark.parametrize(
    "keys",
    [("ema",), ("state_dict", "model"), ("model", "module"), ("params_ema",), ("state", "weights"), ("student",)],
)
def test_weights_are_found_however_deep_they_are_nested(keys, tmp_path):
    state = {name: torch.from_numpy(value) for name, value in published.llamagen().items()}
    for key in reversed(keys):
        state = {key: state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    torch.save(state, tmp_path / "x.pt")
    assert _planned(tmp_path / "x.pt").config.dim == published.DIM


def test_of_weights_and_their_average_the_weights_are_taken_and_that_is_said(tmp_path):
    both = {name: {"norm.weight": torch.full((3,), value)} for name, value in (("ema", 1.0), ("model", 2.0))}
    torch.save(both, tmp_path / "x.pt")
    source = sources.open_source(tmp_path / "x.pt")
    assert source.tensors["norm.weight"].read()[0] == 2
    assert source.notes == (f"note: {tmp_path / 'x.pt'} holds ema too; model is converted",)


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module.", "model.", "ea_layer.",
     "model.module._orig_mod.", "generator.net."],
)  # fmt: skip
def test_what_stands_before_all_names_is_taken_away_in_any_order(prefix, tmp_path):
    tensors = published.drafter() if prefix == "ea_layer." else published.llamagen()
    wrapped = {prefix + name: value for name, value in tensors.items()}
    source = sources.open_source(published.write_pickle(tmp_path / "x.pt", wrapped))
    plain, layouts = fitted(families.FAMILIES["llamagen"], source)
    assert [layout.part for layout in layouts] == ["drafter" if prefix == "ea_layer." else "target"]
    assert plain.tensors.keys() == tensors.keys()


def test_wrappers_within_names_are_taken_away_and_names_that_need_their_beginning_keep_it(tmp_path):
    inner = {name.replace("layers.1.", "layers.1._fsdp_wrapped_module._orig_mod."): value
             for name, value in published.llamagen().items()}  # fmt: skip
    assert _planned(published.write_pickle(tmp_path / "x.pt", inner)).config.layers == published.LAYERS
    save_file(published.llamagen_hf(), tmp_path / "x.safetensors")
    plain, (layout,) = fitted(families.FAMILIES["llamagen"], sources.open_source(tmp_path / "x.safetensors"))
    assert layout is llamagen.HUGGING_FACE and "model.norm.weight" in plain.tensors


def test_eight_bit_floats_are_read_from_both_kinds_of_files_without_loss(tmp_path):
    for kind in ("float8_e4m3fn", "float8_e5m2"):
        value = torch.tensor([[0.5, -1.75], [448.0, 0.0]]).to(getattr(torch, kind))
        torch.save({"x": value}, tmp_path / "x.pt")
        save_torch({"x": value}, tmp_path / "x.safetensors")
        for name in ("x.pt", "x.safetensors"):
            tensor = sources.open_source(tmp_path / name).tensors["x"]
            assert tensor.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(tensor.read().astype(np.float32), value.float().numpy())


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "negated", "transposed", "parameter"])
def test_tensors_that_pytorch_keeps_in_other_ways_are_read_as_they_are(layout, tmp_path):
    dense = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]])
    kept = {
        "sparse_coo": dense.to_sparse(),
        "sparse_csr": dense.to_sparse_csr(),
        "negated": torch._neg_view(-dense),
        "transposed": dense.t().contiguous().t(),
        "parameter": torch.nn.Parameter(dense),
    }[layout]
    torch.save({"x": kept}, tmp_path / "x.pt")
    np.testing.assert_array_equal(sources.open_source(tmp_path / "x.pt").tensors["x"].read(), dense)


def _unusable(kind: str) -> torch.Tensor:
    plain = torch.ones(published.DIM)
    return {
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(published.DIM, device="meta"),
        "complex": lambda: plain.to(torch.complex64),
        "scales": lambda: plain.to(torch.float8_e8m0fnu),
        "rows": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    }[kind]()


UNUSABLE = {
    "quantised": "norm.weight is quantised (qint8)",
    "meta": "norm.weight has no numbers: it was saved from the meta device",
    "complex": "norm.weight is complex (complex64)",
    "scales": "norm.weight is stored as float8_e8m0fnu",
    "rows": "norm.weight is a nested tensor",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_are_no_weights_are_named_with_the_reason(kind, tmp_path):
    state = {name: torch.from_numpy(value) for name, value in published.llamagen().items()}
    torch.save(state | {"norm.weight": _unusable(kind)}, tmp_path / "x.pt")
    with pytest.raises(ConvertError) as error:
        _planned(tmp_path / "x.pt")
    assert UNUSABLE[kind] in str(error.value)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1, 1), (2, 3, 4, 5)])
def test_tensors_of_any_shape_are_misshapen_and_nothing_worse(shape, tmp_path):
    for i, name in enumerate(("layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight", "output.weight")):
        tensors = published.llamagen() | {name: np.zeros(shape, np.float32)}
        with pytest.raises(ConvertError, match="1 misshapen: "):
            _planned(published.write_pickle(tmp_path / f"{i}.pt", tensors))


def test_complex_numbers_are_no_weights_in_safetensors_either_and_unknown_types_are_named(tmp_path):
    tensors = {name: torch.from_numpy(value) for name, value in published.llamagen().items()}
    save_torch(tensors | {"norm.weight": torch.ones(published.DIM, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(ConvertError, match=r"1 no weights: norm\.weight is complex"):
        _planned(tmp_path / "x.safetensors")
    text = json.dumps({"x": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"0")
    with pytest.raises(ConvertError, match="holds x as Q9, a type that is not known here"):
        sources.open_source(tmp_path / "y.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_integer_weights_are_warned_of_and_become_floats(dtype, tmp_path, downloads):
    tensors = published.llamagen() | {"norm.weight": np.ones(published.DIM, dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    said: list[str] = []
    sides = [tmp_path / "x.safetensors", downloads / "vq_ds16_t2i.pt"]
    convert("llamagen", sides, tmp_path / "out", pixels=64, say=said.append)
    assert f"has weights that are integers: norm.weight ({dtype})" in said[0] and "warning" in said[0]
    assert bundle.stored(tmp_path / "out")["target.norm.scale"].dtype == np.float32


def test_infinite_weights_are_warned_of_by_name(tmp_path, downloads):
    tensors = published.llamagen() | {"norm.weight": np.full(published.DIM, -np.inf, np.float32)}
    source = published.write_pickle(tmp_path / "x.pt", tensors, "model")
    said: list[str] = []
    convert("llamagen", [source, downloads / "vq_ds16_t2i.pt"], tmp_path / "out", pixels=64, say=said.append)
    assert said[0] == f"warning: norm.weight of {source} contains infinite numbers"


def test_a_file_of_no_known_kind_has_no_format(tmp_path):
    assert recognise(families.FAMILIES["llamagen"], sources.open_source(_unknown(tmp_path))) == []


def _unknown(tmp_path):
    save_file({"some.weight": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def _bad_source(kind: str, tmp_path: pathlib.Path, downloads: pathlib.Path) -> pathlib.Path:
    """A model file with something wrong."""
    file = tmp_path / "model.safetensors"
    match kind:
        case "truncated":
            save_file(published.llamagen(), file)
            file.write_bytes(file.read_bytes()[:-100])
        case "cut in its header":
            save_file(published.llamagen(), file)
            file.write_bytes(file.read_bytes()[:50])
        case "lies about a shape" | "lies about offsets" | "no header":
            save_file(published.llamagen(), file)
            raw = file.read_bytes()
            size = struct.unpack("<Q", raw[:8])[0]
            header = json.loads(raw[8 : 8 + size])
            if kind == "lies about a shape":
                header["norm.weight"]["shape"] = [published.DIM * 1000]
            elif kind == "lies about offsets":
                header["norm.weight"]["data_offsets"] = [0, 1 << 50]
            text = json.dumps(header).encode() if kind != "no header" else b"[1, 2]"
            file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
        case "runs code":
            file = tmp_path / "model.pt"
            torch.save({"model": {"x": _Bomb()}}, file)
        case "truncated pickle":
            file = published.write_pickle(tmp_path / "model.pt", published.llamagen(), "model")
            file.write_bytes(file.read_bytes()[:5000])
        case "missing shard":
            file = published.write_folder(
                tmp_path / "hf", published.llamagen_hf(), published.LLAMAGEN_HF_SETTINGS, shards=3
            )
            (file / "model-00002-of-00003.safetensors").unlink()
        case "shard outside":
            file = published.write_folder(tmp_path / "hf", published.llamagen_hf(), {}, shards=2)
            index = file / "model.safetensors.index.json"
            index.write_text(index.read_text().replace("model-00001", "../model-00001"))
        case "no file":
            file = tmp_path / "nowhere.pt"
        case "empty folder":
            file = tmp_path / "empty"
            file.mkdir()
        case "another file":
            file = tmp_path / "model.txt"
            file.write_text("hello")
        case "unknown":
            file = _unknown(tmp_path)
        case "twice":
            file = downloads / "vq_ds16_t2i.pt"
        case "no target":
            file = downloads / "flan-t5-xl"
        case "wrong family":
            weights = published.vqgan(channels=32, multipliers=(1, 1), blocks=1, latent=32, codes=64, width=8)
            file = published.write_pickle(tmp_path / "vqgan.ckpt", weights, "state_dict")
        case "extra tensors":
            more = {**published.llamagen(), "adapter.weight": np.ones(5, np.float32)}
            file = published.write_pickle(tmp_path / "t2i_XL_stage1_256.pt", more, "model")
        case "pointer of Git LFS":
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1550\n")
        case "web page":
            file = tmp_path / "model.pt"
            file.write_text("\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>")
        case "refusal":
            file.write_text("Access to model jadohu/LlamaGen-T2I is restricted.")
        case "nothing":
            file.touch()
        case "program":
            file = tmp_path / "model.pt"
            torch.jit.script(torch.nn.Linear(2, 2)).save(file)
        case "archive":
            file = tmp_path / "model.pth"
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("checkpoint/model.safetensors", b"")
        case "no tensors":
            file = tmp_path / "model.pt"
            torch.save({"ema": {"decay": 0.999}, "args": {"lr": 1e-4}, "step": 3}, file)
        case "list":
            file = tmp_path / "model.pt"
            torch.save([torch.ones(2)], file)
        case "numbered":
            file = tmp_path / "model.pt"
            torch.save({0: torch.ones(2), 1: torch.ones(2)}, file)
        case "settings are a pointer":
            file = published.write_folder(tmp_path / "hf", published.llamagen_hf(), {})
            (file / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
        case "settings are a list":
            file = published.write_folder(tmp_path / "hf", published.llamagen_hf(), {})
            (file / "config.json").write_text("[]")
        case "settings make no sense":
            file = published.write_folder(tmp_path / "hf", published.llamagen_hf(), {"block_size": 250})
        case "adapter":
            file = tmp_path / "adapter_model.safetensors"
            save_file({"base_model.model.q_proj.lora_A.weight": np.ones(3, np.float32)}, file)
        case "offsets are three":
            text = json.dumps({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0, 0]}}).encode()
            file.write_bytes(struct.pack("<Q", len(text)) + text)
        case "size unknown":
            file = published.write_pickle(tmp_path / "model.pt", published.llamagen(), "model")
    return file


BAD = {
    "truncated": "its header promises",
    "cut in its header": "cut short: download it again",
    "lies about a shape": "its header lies about norm.weight",
    "lies about offsets": "its header lies about",
    "no header": "its header makes no sense",
    "runs code": "is refused: it asks for posix.system",
    "truncated pickle": "is damaged",
    "missing shard": "lacks model-00002-of-00003.safetensors",
    "shard outside": "names files outside its folder",
    "no file": "there is no checkpoint",
    "empty folder": "holds no .safetensors",
    "another file": "is no checkpoint: known are .safetensors",
    "unknown": "is no part of llamagen: its tensors are some.weight",
    "twice": "are both a vq",
    "no target": "llamagen needs its target too (LlamaGen or LlamaGen, Hugging Face layout)",
    "wrong family": "is no part of llamagen: it looks like Chameleon's VQGAN (lumina-mgpt)",
    "extra tensors": "does not fit: 1 left over: adapter.weight",
    "size unknown": "give --pixels 256, 384 or 512",
    "pointer of Git LFS": "model.safetensors is a pointer of Git LFS and not the file itself: run `git lfs pull`",
    "web page": "model.pt is a web page and not the file itself",
    "refusal": 'is a text and not a checkpoint: "Access to model jadohu/LlamaGen-T2I is restricted."',
    "nothing": "model.safetensors is empty: download it again",
    "program": "is no part of llamagen: its tensors are weight, bias",
    "archive": "is an archive of checkpoint/model.safetensors: unpack it",
    "no tensors": "holds no tensors that could be a model's: its keys are 'ema', 'args', 'step'",
    "list": "holds a list, not a dictionary of tensors",
    "numbered": "is no part of llamagen: its tensors are 0, 1",
    "settings are a pointer": "config.json is a pointer of Git LFS",
    "settings are a list": "config.json is damaged: it holds no settings by name",
    "settings make no sense": "hf is no proper LlamaGen, Hugging Face layout: image_tokens must be a square number",
    "adapter": "it is an adapter (LoRA): merge it into its model first",
    "offsets are three": "is damaged: its header makes no sense",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_line_and_leave_nothing(kind, tmp_path, downloads, capsys, empty_folder):
    source = _bad_source(kind, tmp_path, downloads)
    assert cli.main(["convert", "llamagen", str(source), str(downloads / "vq_ds16_t2i.pt"), "out"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert BAD[kind] in err
    assert list(empty_folder.iterdir()) == []
