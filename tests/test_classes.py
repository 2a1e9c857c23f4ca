"""Class-conditional models, from a class's name to a drafter of their own."""

import dataclasses
import json

import pytest
import tiny_bundles

from cascade_jax import bundle, cli, methods
from cascade_jax.text import classes

IMAGENET = 1000


@pytest.mark.parametrize(
    ("text", "meant"),
    [("207", 207), ("golden retriever", 207), ("  Golden  Retriever ", 207), ("Cardigan", 264), ("cardigan", 474)],
)
def test_a_class_is_a_number_or_a_name(text, meant):
    assert classes.number(text, IMAGENET) == meant


def test_every_name_means_its_own_number():
    names = classes.names(IMAGENET)
    assert len(set(names)) == IMAGENET
    assert [classes.number(name, IMAGENET) for name in names] == list(range(IMAGENET))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1000", "0 to 999, or ImageNet's name for it, not '1000'"),
        ("cat", r"not 'cat'; there is tiger cat \(282\), Persian cat"),
        ("goldfsh", r"there is goldfish \(1\)"),
        ("CARDIGAN", r"there is Cardigan \(264\), cardigan \(474\)"),
        ("a b c d", "not 'a b c d'$"),
    ],
)
def test_an_unknown_name_is_told_its_like(text, said):
    with pytest.raises(ValueError, match=said):
        classes.number(text, IMAGENET)


def test_other_classes_have_no_names():
    with pytest.raises(ValueError, match="a prompt is the number of a class, 0 to 9, not 'golden retriever'"):
        classes.number("golden retriever", 10)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["eagle1", "eagle3"])
def test_a_drafter_is_distilled_trained_and_drawn_with_by_every_method(drafter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_bundles.bundle("classes")
    bundle.save(
        "model",
        dataclasses.replace(model.config, drafter=None, text="class"),
        {"target": model.params["target"], "vq": model.params["vq"]},
    )
    with open("classes.txt", "w") as file:
        file.write("\n".join(map(str, range(10))))
    common = ["--model", "model"]
    assert cli.main(["distill", *common, "--prompts", "classes.txt", "--count", "12", "--batch", "4"]) == 0
    train = ["--steps", "2", "--batch", "4", "--evaluated", "2"]
    assert cli.main(["train", *common, "--data", "data", "--drafter", drafter, "--out", "run", *train]) == 0
    own = {
        name: {setting.name for setting in entry.settings} for name, entry in methods.METHODS.items() if name != "ar"
    }
    wanted = [
        f"{name}:window=3" if {"window", "guess"} <= own[name] and name != "exact" else f"{name}:tree=chain:2"
        for name in own
    ]
    asked = ["--methods", ",".join(["ar", *wanted]), "--prompts", "classes.txt", "--count", "2", "--timed", "0"]
    assert cli.main(["eval", "--model", "run/model", *asked, "--out", "out"]) == 0
    with open("out/report.json") as file:
        report = json.load(file)["methods"]
    assert report.keys() == {"ar", *own}
    assert all(0 < figures["target_steps"] <= report["ar"]["target_steps"] for figures in report.values())
