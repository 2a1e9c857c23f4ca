import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from small import write_bundle

from cascade_jax import acceptance, cli, decode, files, methods, pipeline, rules, trees
from cascade_jax.cli import commands, console, spellings
from cascade_jax.tree import name_of, named

PROMPT = "a red ball on gravel"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def bundle(model):
    return pipeline.load(model)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch, model, bundle):
    """Every test starts in an empty folder, with a cache of its own beside it, and loads the same model only once."""
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda name, *rest, **own: bundle if name == model else load(name, *rest))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def picture(path):
    return np.asarray(Image.open(path))


def test_json_is_all_that_is_printed_and_describes_each_picture(model, capsys):
    assert cli.main(["generate", PROMPT, "--model", model, "--tree", "chain:1", "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["method"], report["tree"]) == (model, "cascade", "chain:1")
    assert report["seconds"] > 0
    assert report["compile_seconds"] >= 0
    (drawn,) = report["pictures"]
    assert (drawn["prompt"], drawn["seed"], drawn["file"]) == (PROMPT, 3, "a-red-ball-on-gravel.png")
    assert drawn["steps"] + drawn["accepted"] == 15  # 16 tokens, the first of which the prefill yields
    assert drawn["alpha"] == pytest.approx(drawn["accepted"] / drawn["steps"])
    assert drawn["tokens_per_step"] == pytest.approx(drawn["alpha"] + 1)
    assert {"nominal", "coupled", "divergence"} <= set(drawn)
    assert picture(drawn["file"]).shape == (8, 8, 3)
    assert os.listdir() == [drawn["file"]]


def test_a_picture_depends_on_prompt_seed_and_number_alone(model, bundle, capsys):
    flags = ["--model", model, "--method", "ar", "--seed", "7"]
    assert cli.main(["generate", PROMPT, "a blue cone", *flags, "--out", "two"]) == 0
    assert sorted(line.split()[0] for line in capsys.readouterr().out.splitlines()) == sorted(
        f"two/{name}" for name in os.listdir("two")
    )
    assert cli.main(["generate", PROMPT, *flags, "--out", "sub/one.png"]) == 0
    first, second = picture("two/a-red-ball-on-gravel-0.png"), picture("two/a-blue-cone-1.png")
    np.testing.assert_array_equal(picture("sub/one.png"), first)
    assert (first != second).any()
    # the same as the library's, in batches of any size
    ar, quiet = methods.method("ar", bundle), lambda *_: None
    prompts = [PROMPT, "a blue cone", PROMPT]
    batches = methods.draw_all(bundle, ar, prompts, 7, None, quiet, batch=2)
    drawn = [image for _, batch in batches for image in batch.images]
    np.testing.assert_array_equal(drawn[0], first)
    np.testing.assert_array_equal(drawn[1], second)
    assert len(drawn) == 3
    assert (drawn[2] != first).any()
    whole = pipeline.generate(bundle, prompts[:2], jax.random.key(7), tree=ar.tree, progress=quiet)
    np.testing.assert_array_equal(whole.images, drawn[:2])
    ((_, last),) = methods.draw_all(bundle, ar, prompts[2:], 7, None, quiet, first=2)
    np.testing.assert_array_equal(last.images[0], drawn[2])


BAD = {
    "unknown method": (["generate", PROMPT, "--method", "magic"], "unknown method 'magic'; known: ar, eagle"),
    "unknown model": (["generate", PROMPT, "--model", "nowhere"], "no model 'nowhere'"),
    "no prompt": (["generate"], "there is no prompt"),
    "empty prompt": (["generate", PROMPT, " "], "a prompt is empty"),
    "unknown words": (["generate", "a red zebra"], "unknown word zebra. Known things: ball"),
    "dtype": (["generate", PROMPT, "--dtype", "half"], "dtype must be float32 or bfloat16, not 'half'"),
    "no count": (["generate", PROMPT, "--count", "0"], "count must be at least 1, not 0"),
    "half a count": (["generate", PROMPT, "--count", "1.5"], "--count takes a whole number, not '1.5'"),
    "a word for a number": (["generate", PROMPT, "--budget", "low"], "--budget takes a number, not 'low'"),
    "negative seed": (["generate", PROMPT, "--seed", "-1"], "seed must be between 0 and"),
    "tau_pos": (["generate", PROMPT, "--tau-pos", "-2"], "tau_pos must be at least -1, not -2"),
    "not a number": (["generate", PROMPT, "--tau-seq", "nan"], "tau_seq must be at least -1, not nan"),
    "budget": (["generate", PROMPT, "--budget", "-0.1"], "budget must be at least 0"),
    "ledger": (["generate", PROMPT, "--ledger", "red"], 'ledger must be "nominal" or "coupled"'),
    "mass": (["generate", PROMPT, "--mass", "rest"], 'mass must be "current" or "next"'),
    "delta": (["generate", PROMPT, "--method", "lantern", "--delta", "-1"], "delta must be at least 0"),
    "lam": (["generate", PROMPT, "--method", "lantern++", "--lam", "0.5"], "lam must be at least 1"),
    "neighbours": (["generate", PROMPT, "--method", "lantern", "--neighbours", "64"], "between 0 and 63 for 64 codes"),
    "group": (["generate", PROMPT, "--method", "gsd", "--group", "0"], "a group has at least 1 token"),
    "large group": (["generate", PROMPT, "--method", "gsd", "--group", "65"], "group must be at most 64"),
    "another's": (["generate", PROMPT, "--method", "gsd", "--budget", "1"], "gsd does not take budget"),
    "ar's tree": (["generate", PROMPT, "--method", "ar", "--tree", "chain:2"], "ar draws token by token"),
    "unknown tree": (["generate", PROMPT, "--tree", "oak"], "unknown tree 'oak'; known: eagle25"),
    "tree with a gap": (["generate", PROMPT, "--tree", "0 00 010"], "path [0, 1, 0] lacks its parent [0, 1]"),
    "empty chain": (["generate", PROMPT, "--tree", "chain:0"], "a chain needs a depth of at least 1"),
    "huge tree": (["generate", PROMPT, "--tree", "full:9x99"], "more than 512 drafts"),
    "temperature": (["generate", PROMPT, "--temperature", "-1"], "temperature must be at least 0"),
    "top_k": (["generate", PROMPT, "--top-k", "0"], "top_k must be at least 1"),
    "top_p": (["generate", PROMPT, "--top-p", "1.5"], "top_p must be in (0, 1]"),
    "guidance": (["generate", PROMPT, "--guidance", "-1"], "guidance must be at least 0"),
    "a file as folder": (["generate", PROMPT, "--out", f"{__file__}/x.png"], "is not a folder"),
    "no place for files": (["generate", PROMPT, "--out", "/proc/x/y.png"], "cannot write to /proc/x"),
    "one name for two": (["generate", PROMPT, "--count", "2", "--out", "x.png"], "give a folder"),
    "another format": (["generate", PROMPT, "--out", "x.jpg"], "written as PNG"),
    "top_k of none": (["generate", PROMPT, "--top-k", "0"], "a large number draws from all tokens"),
    "unknown flag": (["generate", PROMPT, "--fast"], "Unrecognized options: --fast (see cascade-jax generate --help)"),
    "sweep: unknown flag": (["scenes", "sweep", "--fast"], "--fast (see cascade-jax scenes sweep --help)"),
    "unknown command": (["draw"], "unknown command 'draw'; there are generate, generate-list, trace, compare"),
    "a slip": (["evel"], "unknown command 'evel', perhaps eval; there are"),
    "no command": ([], "say which command; there are generate, "),
    "no scenes command": (
        ["scenes"],
        "there are scenes sweep, scenes train, scenes pack (see cascade-jax scenes --help)",
    ),
    "a slip behind scenes": (["scenes", "swep"], "unknown command 'scenes swep', perhaps scenes sweep"),
    "compare: method": (["compare", "--methods", "ar,warp"], "unknown method 'warp'"),
    "compare: no file": (["compare", "--prompts", "none.txt"], "there is no prompts file none.txt"),
    "compare: empty file": (["compare", "--prompts", os.devnull], "there is no prompts file"),
    "compare: count": (["compare", "--count", "0"], "count must be at least 1"),
    "compare: setting": (["compare", "--methods", "eagle", "--budget", "1"], "none of ar, eagle takes budget"),
    "sweep: tree": (["scenes", "sweep", "--trees", "oak"], "unknown tree 'oak'"),
    "sweep: budget": (["scenes", "sweep", "--budget", "0.1,-1"], "budget must be at least 0"),
    "sweep: no number": (["scenes", "sweep", "--tau-pos", "0.5,x"], "--tau-pos takes numbers and commas, not '0.5,x'"),
    "train: part": (["scenes", "train", "engine"], "unknown part 'engine'; known: tokenizer"),
    "train: order": (["scenes", "train", "target"], "holds no checkpoint"),
    "pack: no runs": (["scenes", "pack", "nowhere"], "there is no folder nowhere"),
    "bench: batch": (["bench", "--batch", "1,x"], "--batch takes whole numbers and commas, not '1,x'"),
    "bench: no batch": (["bench", "--batch", ","], "batch must be at least 1"),
    "bench: method": (["bench", "--method", "ar"], "static draft tree, not ar"),
    "bench: shapes": (["bench", "--shapes", "xxl"], "unknown shapes 'xxl'"),
}


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, model, capsys, empty_folder):
    if argv[:1] in (["generate"], ["compare"], ["bench"]) and "--model" not in argv:
        argv = [*argv, "--model", model]
    if argv[:2] == ["scenes", "sweep"]:
        argv = [*argv, "--model", model]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("cascade-jax: ")
    assert message in err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["no config", "half a config", "no parameters", "half the parameters"])
def test_a_damaged_model_is_refused_in_one_line(damage, model, tmp_path, capsys, collected):
    copy = pathlib.Path(shutil.copytree(model, tmp_path / "copy"))
    match damage:
        case "no config":
            (copy / "config.json").unlink()
        case "half a config":
            text = (copy / "config.json").read_text()
            (copy / "config.json").write_text(text[: len(text) // 2])
        case "no parameters":
            shutil.rmtree(copy / "params")
        case "half the parameters":
            largest = max((f for f in (copy / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
            largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert cli.main(["generate", PROMPT, "--model", str(copy)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(copy) in err
    assert os.listdir() == []


def test_without_a_drafter_a_method_that_drafts_with_one_is_refused(tmp_path, capsys):
    model = str(write_bundle(tmp_path / "model", drafter=False))
    assert cli.main(["generate", PROMPT, "--model", model, "--method", "eagle"]) == 2
    assert "this model has no drafter: draw with --method ar" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_drafter_and_a_method_the_model_drafts_by_itself(tmp_path, capsys):
    model = str(write_bundle(tmp_path / "model", drafter=False))
    assert cli.main(["generate", PROMPT, "--model", model, "--out", str(tmp_path / "one.png"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["method"] == "scd" and "drawn by scd, which needs none" in err
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_between_two_chunks_of_steps(number, model, monkeypatch, capsys):
    chunks, run = [], decode.run_jit

    def interrupted(*args):
        chunks.append(1)
        signal.raise_signal(number)
        return run(*args)

    monkeypatch.setattr(decode, "run_jit", interrupted)
    monkeypatch.setattr(pipeline, "CHUNK", 2)
    assert cli.main(["generate", PROMPT, "--model", model, "--method", "ar"]) == 130
    out, err = capsys.readouterr()
    assert (out, len(chunks)) == ("", 1)
    assert err.startswith("cascade-jax: interrupted")
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_the_module_runs_and_its_libraries_stay_silent(model):
    def run(*argv):
        command = [sys.executable, "-m", "cascade_jax", *argv]
        root = str(pathlib.Path(cli.__file__).parents[1])
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})

    helped = run("--help")
    assert helped.returncode == 0
    assert helped.stderr == ""
    assert all(name in helped.stdout for name in ("generate", "compare", "bench", "scenes"))
    refused = run("generate", "a red zebra", "--model", model)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert "zebra" in refused.stderr


def test_compiled_programs_go_to_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    assert console.cache_folder() == tmp_path / "cache" / "cascade_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert console.cache_folder() == pathlib.Path.home() / ".cache" / "cascade_jax" / "xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert console.cache_folder() == pathlib.Path("/elsewhere")


def test_methods_have_the_papers_defaults(bundle):
    made = {name: methods.method(name, bundle) for name in methods.METHODS}
    assert made["ar"].tree == trees.ROOT
    assert made["lantern"].tree == trees.EAGLE_2
    assert made["lantern++"].tree == trees.LANTERNPP_57
    assert {made[name].tree for name in ("eagle", "gsd", "cascade")} == {trees.EAGLE_25}
    assert made["lantern"].rule.neighbours.shape == (64, 64 // 20)
    assert made["lantern++"].rule.neighbours.shape == (64, 10)
    assert made["lantern++"].rule.lam == 2
    assert made["gsd"].rule == rules.grouped(25)
    assert made["cascade"].settings == {
        "tau_pos": 0.85, "tau_seq": 0.5, "budget": 0.5, "ledger": "nominal", "mass": "current",
        "window": 0, "guess": "repeat", "candidates": 4,
    }  # fmt: skip


def test_a_models_own_settings_are_cascades_defaults(tmp_path):
    own = {"tau_pos": 0.7, "ledger": "coupled", "tree": "chain:3"}
    bundle = pipeline.load(write_bundle(tmp_path / "model", cascade=own))
    cascade = methods.method("cascade", bundle, budget=0.1)
    assert cascade.tree == trees.chain(3)
    assert isinstance(cascade.rule, acceptance.Bounded)
    assert cascade.rule.budget == np.float32(0.1)
    assert cascade.rule.rule.tau_pos == np.float32(0.7)
    assert methods.method("cascade", bundle, tree="full:2x2").tree == trees.full(2, 2)


@pytest.mark.parametrize("text", ["eagle25", "lanternpp57", "eagle2", "chain:4", "0 1 00 01"])
def test_a_trees_name_reads_back_as_the_tree(text):
    assert name_of(named(text)) == text


OLD = {
    "spaces": (
        "eval",
        ["--methods", "ar", "loose=cascade:tau_pos=0.7,budget=1", "--count", "2"],
        ["--methods", "ar,loose=cascade:tau_pos=0.7,budget=1", "--count", "2"],
    ),
    "numbers": (
        "scenes sweep",
        ["--tau-pos", "0.6", "-1", "--budget", "0.1", "0.2"],
        ["--tau-pos", "0.6,-1", "--budget", "0.1,0.2"],
    ),
    "captions": ("eval", ["--captions", "x.tsv"], ["--prompts", "x.tsv"]),
    "captions by =": ("paper", ["table1", "--captions=x.tsv"], ["table1", "--prompts", "x.tsv"]),
    "sampling": (
        "paper",
        ["--sampling", "top_k=5", "temperature=0.5", "--out", "x"],
        ["--top-k", "5", "--temperature", "0.5", "--out", "x"],
    ),
    "settings": ("export", ["--settings", "tau_pos=0.9", "--out", "x"], ["--tau-pos", "0.9", "--out", "x"]),
    "types": ("convert", ["auto", "a", "b", "--dtype", "bf16"], ["auto", "a", "b", "--dtype", "bfloat16"]),
    "drafters": (
        "paper",
        ["--drafters", "a=b", "a=c", "table2"],
        ["--drafters", "a=b,a=c", "table2"],
    ),
}


@pytest.mark.parametrize(("command", "old", "new"), OLD.values(), ids=OLD)
def test_old_spellings_go_on_working_with_a_hint(command, old, new):
    said = []
    assert spellings.modern(command, old, said.append) == new
    assert said
    assert all(" is written " in line for line in said)
    said.clear()
    assert spellings.modern(command, new, said.append) == new
    assert said == []


def test_a_hint_is_on_stderr_and_the_command_runs_on(capsys):
    assert cli.main(["eval", "--captions", "none.txt"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "cascade-jax: --captions none.txt is written --prompts none.txt now"
    assert "there is no prompts file none.txt" in second


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_is_about_the_command_and_names_nothing_internal(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: cascade-jax {name} ")
    titles = re.findall(r"^(?:╭─)? (\S[a-z ]*?) *(?:─*╮)?$(?=\n -|\n│)", out, re.MULTILINE)
    assert "options" in titles
    assert set(titles) <= {
        "positional arguments", "options", "model options", "method options", "sampling options", "metrics options",
        "processes options", "loss options", "optimiser options", "assumption options",
    }  # fmt: skip


def test_every_flag_of_the_same_name_is_written_alike(capsys):
    seen: dict[str, set[str]] = {}
    for name in commands.COMMANDS:
        assert cli.main([*name.split(), "--help"]) == 0
        for flag, metavar in re.findall(r"^[ │]+(--[a-z-]+) (\S+)  ", capsys.readouterr().out, re.MULTILINE):
            seen.setdefault(flag, set()).add(metavar)
    alike = "--model --tree --temperature --top-k --top-p --guidance --prompts --seed --count --mesh --tau-pos"
    for flag in alike.split():
        assert len({metavar.rstrip(",.") for metavar in seen[flag]} - {"X,..."}) == 1, (flag, seen[flag])
    assert seen["--dtype"] == {"float32|bfloat16", "float32|bfloat16|stored"}


def test_the_listing_and_the_version_are_printed(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in commands.COMMANDS)
    assert cli.main(["scenes", "--help"]) == 0
    assert "scenes pack" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"cascade-jax \d+\.\d+\.\d+, jax \S+\n", capsys.readouterr().out)


def test_two_processes_do_not_work_in_one_folder(model, tmp_path, capsys):
    with files.owned(tmp_path / "out"):
        for command in ("compare", "bench", "paper table1", "scenes sweep"):
            argv = [*command.split(), "--out", str(tmp_path / "out"), "--model", model]
            assert cli.main(argv) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            assert "is in use by process" in err


def test_programs_that_could_not_be_kept_are_not_promised(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console.CompileClock, "fresh", 5.0, raising=False)
    monkeypatch.setattr(console.CompileClock, "_add", lambda *_, **own: None)
    monkeypatch.setattr(console.CompileClock, "__init__", lambda self: vars(self).update(_spans=[], _since=0.0))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["generate", PROMPT, "--model", model, "--method", "ar"]) == 0
    assert capsys.readouterr().err == "compiling took 0 s\n"
