"""The page of a trace tells what happened when the picture was drawn, asks for nothing, and works in a browser."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tiny_bundles
from small import write_bundle

import cascade_jax as cj
from cascade_jax import cli, methods, trees
from cascade_jax.evaluation import metrics
from cascade_jax.paper import traces
from cascade_jax.paper.viewer import document, patches
from cascade_jax.paper.viewer.contents import encoded

TREE, RULE, SEED = trees.parse("0 1 2 00 01 10"), cj.cascade(0.3, 0.3, 0.4), 5
METHOD = methods.Method("cascade", RULE, TREE, {"tau_pos": 0.3, "tau_seq": 0.3, "budget": 0.4})
PROMPT = "</script><b>a red ball & more"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundles.bundle("llamagen")


@pytest.fixture(scope="module")
def prompt():
    return tiny_bundles.prompts("llamagen", 1)[0]


@pytest.fixture(scope="module")
def seen(bundle, prompt):
    return traces.of_method(bundle, METHOD, prompt, SEED)


def written(trace) -> str:
    """The page of a trace, with the picture itself beside it."""
    about = document.About(PROMPT, METHOD, "tiny", SEED, sampling={"temperature": float("inf")})
    return document.page(trace, patches.cut(trace, coloured(trace)), about, trace.image)


def made_up(side: int, size: int):
    """A trace as of Lumina-mGPT, whose rows of `side` codes have a newline behind them, with trees of `size` nodes that
    differ from step to step, two accepted drafts in each, and noise for all the rest."""
    rng, length = np.random.default_rng(side), side * (side + 1) + 1
    position = np.arange(1, length, 3)
    steps, places = len(position), np.arange(length - 1).reshape(side, side + 1)[:, :side]
    parents = np.sort(rng.integers(0, np.maximum(np.arange(size) // 3, 1), (steps, size)), axis=1)
    parents[:, :3] = -1, 0, 1
    depths = np.zeros((steps, size), int)
    for node in range(1, size):
        depths[:, node] = np.take_along_axis(depths, parents[:, node, None], axis=1)[:, 0] + 1
    visited = np.arange(size) % 5 == 1
    real = lambda *shape: rng.random((steps, *shape), np.float32)
    turn = lambda: np.where(visited, real(size), np.nan)
    return traces.Trace(
        rule=cj.cascade(0.8, 0.8), output=rng.integers(0, 8192, length), places=places, position=position,
        image=rng.integers(0, 256, (16 * side, 16 * side, 3), np.uint8), tokens=rng.integers(0, 8192, (steps, size)),
        parents=parents, depths=depths, cosine=real(size, size), target=real(size), draft=real(size),
        strict=real(size), probability=turn(), gained=real(size), spent=turn(), first=real(size), second=real(size),
        beside=real(size, size), below=real(size, size), uniform=turn(),
        reason=np.where(visited, traces.REJECTED, traces.NOT_VISITED) * np.ones((steps, 1), np.int8),
        path=np.tile([0, 1, 2, *[-1] * (size - 3)], (steps, 1)), accepted=np.full(steps, 2), nominal=real(),
        next_token=rng.integers(0, 8192, steps), coupled=real(), diverged=np.zeros(steps, bool),
    )  # fmt: skip


def coloured(trace):
    """A decoder that looks at no neighbours: a cell has its token's colour."""
    side = trace.image.shape[0] // trace.places.shape[0]

    def decode(tokens):
        codes = np.asarray(tokens)[:, trace.places]
        colours = np.stack([codes % 256, codes // 256, codes % 7], axis=-1).astype(np.uint8)
        return colours.repeat(side, axis=1).repeat(side, axis=2)

    return decode


def test_a_patch_is_the_pictures_cell_with_the_draft_in_it():
    made = made_up(5, 9)
    decode = coloured(made)
    batches = []

    def counted(tokens):
        batches.append(np.array(tokens))
        return decode(tokens)

    trace = dataclasses.replace(made, image=decode(made.output[None])[0])
    cut = patches.cut(trace, counted)
    place = trace.position[:, None] + trace.depths - 1
    for step, node in np.ndindex(trace.tokens.shape):
        index, token = cut.index[step, node], trace.tokens[step, node]
        if place[step, node] in trace.places:
            assert (cut.cells[index] == [token % 256, token // 256, token % 7]).all()
        else:
            assert index == -1
    # drafts that are decoded together lie apart
    assert len(batches) > 1
    for tokens in np.concatenate(batches):
        rows, columns = np.nonzero((tokens != trace.output)[trace.places])
        apart = np.maximum(abs(rows[:, None] - rows), abs(columns[:, None] - columns))
        assert (apart[~np.eye(len(rows), dtype=bool)] >= patches.APART).all()


def test_the_page_is_one_file_that_asks_for_nothing():
    page = written(made_up(4, 6))
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"<(link|img|script|iframe)[^>]*(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2  # a prompt ends no element
    assert "{{" not in page
    (found,) = re.findall(r'<script type="application/json" id="contents">(.*?)</script>', page, re.DOTALL)
    told = json.loads(found)
    assert told["prompt"] == PROMPT
    assert told["sampling"] == {"temperature": "inf"}
    assert "<title>&lt;/script&gt;&lt;b&gt;a red ball &amp; more: cascade, step by step</title>" in page


def test_scripts_can_be_read_at_a_sitting():
    folder = document.importlib.resources.files("cascade_jax.paper.viewer") / "page"
    for file in folder.iterdir():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file.name
    assert {file.name for file in folder.iterdir()} == {"page.html", "style.css", *document.SCRIPTS}


def test_pictures_are_kept_small():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    assert encoded(noise, 10**6).startswith("data:image/png;base64,")
    small = encoded(noise, 20_000)
    assert small.startswith("data:image/jpeg;base64,")
    assert len(small) < 20_000 * 4 / 3 + 100


def test_a_page_of_2353_tokens_is_below_5_mb():
    """48 x 48 codes with newlines, EAGLE-2's trees, and pictures of which nothing can be compressed."""
    assert len(large().encode()) < 5_000_000


def large() -> str:
    trace, rng = made_up(48, 60), np.random.default_rng(0)
    assert len(trace.output) == 2353
    cells = rng.integers(0, 256, (30_000, 8, 8, 3), np.uint8)
    index = rng.integers(0, len(cells), trace.tokens.shape)
    return document.page(trace, patches.Patches(cells, index), document.About("large", METHOD), trace.image)


BAD = {
    "no prompt": (["trace"], "there is no prompt"),
    "no page": (["trace", "a ball", "--out", "trace.png"], "a trace is a page: --out ends in .html, not trace.png"),
    "method": (["trace", "a ball", "--method", "magic"], "unknown method 'magic'"),
    "model": (["trace", "a ball", "--model", "nowhere"], "no model 'nowhere'"),
    "a mesh": (["eval", "--traces", "1", "--mesh", "data=2"], "leave out --traces or --mesh"),
    "fewer than none": (["eval", "--traces", "-1"], "traces must be at least 0, not -1"),
}


@pytest.mark.parametrize("argv, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_bundle(tmp_path_factory.mktemp("models") / "small"))


WINDOW, SMALL = ["--window", "4"], ["--tree", "0 1 00"]
LOOKED_INTO = (
    ["ar"], ["eagle", "--tree", "eagle2"], ["eagle", "--verifier", "traversal", *SMALL], ["sjd", *WINDOW],
    ["scd", *WINDOW], ["pac", *WINDOW], ["exact", "--tree", "chain:2"], ["lantern", *SMALL], ["gsd", *SMALL],
    ["cool-sd", *SMALL],
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("flags", LOOKED_INTO, ids=" ".join)
def test_every_method_can_be_looked_into(flags, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    window = ["--window", "4"] if flags[0] in ("sjd", "scd", "pac") else []
    assert (
        cli.main(["trace", "a red ball on gravel", "--model", model, "--seed", "3", "--method", *flags, *window]) == 0
    )
    steps = int(re.search(r"trace.html: (\d+) steps for 16 tokens", capsys.readouterr().out)[1])
    told = of_page((tmp_path / "trace.html").read_text())
    assert len(told["steps"]) == steps
    assert (told["beside"] is None) == (flags == ["ar"])
    if flags[0] in ("ar", "eagle", "sjd", "scd", "pac", "exact"):
        assert not any(map(any, told["maps"].values()))
    if flags[0] == "exact":
        assert told["beside"] == told["picture"]


def of_page(text):
    return json.loads(re.search(r'id="contents">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.slow
def test_an_evaluation_links_to_traces_of_its_pictures(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "opened", lambda order: [])  # the judge knows no pictures of this size
    flags = ["--model", model, "--count", "2", "--methods", "ar,eagle:tree=0 1", "--timed", "0", "--traces", "1"]
    assert cli.main(["eval", *flags, "--out", "run"]) == 0
    made = {path.name for path in (tmp_path / "run" / "traces").iterdir()}
    assert made == {"000000-ar.html", "000000-eagle.html"}
    report = (tmp_path / "run" / "report.html").read_text()
    assert set(re.findall(r"href='traces/([^']*)'", report)) == made
    record = json.loads((tmp_path / "run" / "eagle" / "000000.json").read_text())
    told = of_page((tmp_path / "run" / "traces" / "000000-eagle.html").read_text())
    assert len(told["steps"]) == record["steps"]
    assert told["beside"] == of_page((tmp_path / "run" / "traces" / "000000-ar.html").read_text())["picture"]


@pytest.fixture(scope="module")
def opened(seen, tmp_path_factory):
    """Opens the page on a screen of a size: a browser's page, and what its console said."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed (Debian's package: chromium)")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
    )
    file = tmp_path_factory.mktemp("page") / "trace.html"
    document.write(file, written(seen))
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        def open_page(width=1100, height=900, scheme="light", at="", path=file):
            tab = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
            said = []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on(
                "request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else 0
            )
            tab.goto(f"file://{path}{at}")
            tab.wait_for_selector("html[data-ready]", timeout=60_000)
            return tab, said

        yield open_page
        browser.close()


def pixels(tab, canvas):
    return tab.evaluate(f"document.getElementById('{canvas}').toDataURL()")


@pytest.mark.slow
def test_in_a_browser_slider_and_keys_move_the_picture(opened, seen):
    tab, said = opened(at="#step=1")
    assert tab.title() == f"{PROMPT}: cascade, step by step"
    assert tab.inner_text("h1") == PROMPT
    first = pixels(tab, "picture")
    tab.locator("#slider").fill("3")
    assert tab.inner_text("#step-title") == "Step 3"
    third = pixels(tab, "picture")
    assert third != first
    known = int(seen.position[2] + seen.accepted[2] + 1)
    assert tab.inner_text("#picture-count") == f"{min(known, 16)} of 16"
    assert tab.inner_text("#beside-count") == "4 of 16"
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert pixels(tab, "picture") == first
    tab.keyboard.press("End")
    assert tab.inner_text("#at") == f"{len(seen)} / {len(seen)}"
    tab.keyboard.press("Home")
    assert tab.inner_text("#at") == f"0 / {len(seen)}"
    tab.keyboard.press(" ")
    tab.wait_for_selector("#play:not(.on)", timeout=60_000)  # which it is while it plays
    assert tab.inner_text("#at") == f"{len(seen)} / {len(seen)}"
    assert said == []


@pytest.mark.slow
def test_in_a_browser_drafts_tell_their_numbers_by_pointer_and_keyboard(opened, seen):
    tab, said = opened(at="#step=1")
    node = int(np.flatnonzero(seen.reason[0])[0])
    tab.locator("#walk li").first.hover()
    shown = tab.inner_text("#draft")
    assert f"{seen.uniform[0, node]:.3g}" in shown
    assert str(seen.tokens[0, node]) in shown
    tab.locator(".node.chosen").focus()
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#draft") != shown
    assert tab.evaluate("document.activeElement.className").startswith("node")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#step-title") == "Step 2"
    assert tab.evaluate("document.activeElement.className").startswith("node")
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser_it_fits_the_screen_in_light_and_dark(width, opened):
    grounds = set()
    for scheme in ("light", "dark"):
        tab, said = opened(width, 740, scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        grounds.add(tab.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        tab.locator("#theme").click()
        grounds.add(tab.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        assert said == []
    assert len(grounds) == 2


@pytest.mark.slow
def test_in_a_browser_a_large_picture_opens_and_moves(opened, tmp_path):
    document.write(tmp_path / "large.html", large())
    tab, said = opened(path=tmp_path / "large.html")
    before = pixels(tab, "picture")
    tab.keyboard.press("ArrowRight")
    assert pixels(tab, "picture") != before
    assert said == []
