"""The commands of docs/models.md, run as they stand there, on small checkpoints in the published formats."""

import json
import pathlib
import re
import shlex

import numpy as np
import oracles
import published
import pytest
import test_fusion
from test_convert_families import SMALL, meta, shared_norms
from test_cosmos import write_cosmos

from cascade_jax import cli
from checkpoints_convert import tiktoken
from checkpoints_convert.sources import open_source

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
FETCHED = "From the hub"  # its addresses are filled in by who reads it


def commands() -> dict[str, list[list[str]]]:
    """`cascade-jax` commands by the title of their section."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
        lines = [shlex.split(line) for line in blocks.splitlines()]
        title = section.partition("\n")[0]
        if title == FETCHED:
            continue
        found[title] = [line[1:] for line in lines if line and line[0] == "cascade-jax"]
    return found


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty folder as the place where commands run, and `downloads` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "downloads"


def llamagen(home: pathlib.Path) -> None:
    for stage in ("stage1_256", "stage2_512"):
        published.write_pickle(home / f"t2i_XL_{stage}.pt", published.llamagen(), "model", steps=3)
    published.write_pickle(home / "vq_ds16_t2i.pt", published.vq(), "model")
    for name in ("llamagen_drafter", "llamagen2_drafter"):
        published.write_folder(home / name, published.drafter(), published.DRAFTER_SETTINGS, pickled=True)
    published.write_folder(home / "LlamaGen-T2I-2", published.llamagen_hf(), published.LLAMAGEN_HF_SETTINGS)
    published.write_folder(home / "flan-t5-xl", published.t5(), published.T5_SETTINGS, shards=2)
    published.write_tokenizer(home / "flan-t5-xl" / "tokenizer.json")


def classes(home: pathlib.Path) -> None:
    published.write_pickle(home / "c2i_B_256.pt", published.llamagen(classes=True), "model")
    published.write_pickle(home / "vq_ds16_c2i.pt", published.vq(), "model")


def chameleon(home: pathlib.Path) -> None:
    """Lumina-mGPT, which comes without a text tokenizer, and Anole as Meta lays models out."""
    vocabulary, model = oracles.chameleon_vocabulary(), shared_norms(oracles.chameleon())
    oracles.save(model, home / "Lumina-mGPT-7B-768", shards="40KB")
    settings = json.loads((home / "Lumina-mGPT-7B-768" / "config.json").read_text()) | {"vocabulary_map": None}
    (home / "Lumina-mGPT-7B-768" / "config.json").write_text(json.dumps(settings))
    published.write_pickle(home / "anole" / "models" / "7b" / "consolidated.pth", meta(model))
    (home / "anole" / "models" / "7b" / "params.json").write_text(json.dumps({"model": {"norm_eps": 1e-5}}))
    oracles.write_tokenizer(home / "anole" / "tokenizer" / "text_tokenizer.json", vocabulary)
    published.write_pickle(home / "anole" / "tokenizer" / "vqgan.ckpt", published.vqgan(**SMALL), "state_dict")
    weights = published.chameleon_drafter(dim=32, heads=4, kv_heads=2, ffn=48, vocab=128)
    published.write_folder(home / "anole_drafter", weights, published.CHAMELEON_DRAFTER_SETTINGS, pickled=True)


def janus(home: pathlib.Path) -> None:
    oracles.save(oracles.janus(seed=4), home / "Janus-Pro-7B", oracles.janus_vocabulary())


def lumina2(home: pathlib.Path) -> None:
    first, names = 155000, ["<|endoftext|>", "<unk>", "\n", *map(chr, range(32, 127)), "<racm3:break>", "<eoss>"]
    names += ["<reserved08706>", "<reserved08799>", *(f"<reserved{8800 + i:05d}>" for i in range(25))]
    model = oracles.chameleon(vocab_size=first + oracles.CODES, vocabulary_map={"<image>": 1})
    oracles.save(model, home / "Lumina-mGPT-2.0", {name: i for i, name in enumerate(names)})
    sizes = dict(channels=32, multipliers=(1,) * 4, blocks=1, latent=4, codes=oracles.CODES, width=4)
    published.write_pickle(home / "movqgan_270M.ckpt", published.vqgan(**sizes, attention=True, modulated=True))


def emu3(home: pathlib.Path) -> None:
    """Emu3 with pictures of 16 pixels, under its authors' names, and Emu3.5."""
    vocabulary = tiktoken.vocabulary(oracles.write_tiktoken(home / "Emu3-Gen"))
    oracles.save(oracles.emu3(vocabulary), home / "hf")
    weights = {name: np.array(tensor.read()) for name, tensor in open_source(home / "hf").tensors.items()}
    text = {n.removeprefix("text_model."): w for n, w in weights.items() if "vqmodel" not in n}
    settings = {"num_attention_heads": 4, "image_area": 256, "rope_theta": 1e6}
    published.write_folder(home / "Emu3-Gen", text, settings)
    published.write_folder(home / "Emu3-VisionTokenizer", oracles.emu3_vq_original(weights), {})
    oracles.write_tiktoken(home / "Emu3.5-Image")
    oracles.save(oracles.emu3_5(vocabulary), home / "Emu3.5-Image")
    published.write_pickle(home / "Emu3.5-VisionTokenizer" / "model.ckpt", oracles.ibq(), "state_dict")


def simplear(home: pathlib.Path) -> None:
    oracles.save(test_fusion.transformer("simplear"), home / "SimpleAR-0.5B-RL", test_fusion.vocabulary("simplear"))
    write_cosmos(home / "Cosmos-1.0-Tokenizer-DV8x16x16", whole=True, levels=(2,) * 6)


def liquid(home: pathlib.Path) -> None:
    oracles.save(test_fusion.transformer("liquid"), home / "Liquid_V1_7B", test_fusion.vocabulary("liquid"))
    published.write_pickle(
        home / "anole" / "tokenizer" / "vqgan.ckpt", published.vqgan(**test_fusion.VQGAN), "state_dict"
    )


def metrics(home: pathlib.Path) -> None:
    oracles.save(oracles.clip(2), home / "clip")
    with np.load(pathlib.Path(__file__).parent / "golden" / "inception.npz") as golden:
        shapes = json.loads(str(golden["shapes"]))
    published.write_pickle(home / "pt_inception-2015-12-05-6726825d.pth", published.inception(shapes))


MAKERS = {
    "LlamaGen, from captions": llamagen,
    "LlamaGen, from classes": classes,
    "Lumina-mGPT": chameleon,
    "Anole": chameleon,
    "Janus-Pro": janus,
    "Lumina-mGPT 2.0": lumina2,
    "Emu3 and Emu3.5": emu3,
    "SimpleAR": simplear,
    "Liquid": liquid,
    "CLIP and Inception-v3, to measure pictures with": metrics,
}


def test_every_section_is_run():
    assert commands().keys() == MAKERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("section", MAKERS)
def test_its_commands_lead_from_downloads_to_pictures(section, downloads, monkeypatch, capsys):
    monkeypatch.setattr(published, "CODES", 1024)  # more than the neighbours that the page asks for
    monkeypatch.setattr(published, "CLASSES", 1000)
    downloads.mkdir()
    MAKERS[section](downloads)
    for command in commands()[section]:
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
    if MAKERS[section] is not metrics:
        assert list(pathlib.Path.cwd().rglob("*.png"))
