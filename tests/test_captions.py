"""Captions from files as they are published."""

import json
import types

import pytest

from cascade_jax.scenes import data
from cascade_jax.text import captions


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def annotation(own, image, caption):
    return {"id": own, "image_id": image, "caption": caption}


def test_coco_gives_the_lowest_annotation_of_every_image_by_image(tmp_path):
    stored = {
        "info": {},
        "images": [{"id": 724, "file_name": "000000000724.jpg"}, {"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [
            annotation(90, 724, "A stop sign."),
            annotation(12, 139, "A room with a\nwooden table. "),
            annotation(31, 724, "An older sign is upside-down."),
            annotation(40, 139, "A woman."),
        ],
    }
    found = captions.read(write(tmp_path / "captions_val2017.json", stored))
    assert found == [
        captions.Caption("A room with a wooden table.", 0, None, "image 139"),
        captions.Caption("An older sign is upside-down.", 1, None, "image 724"),
    ]
    stored["annotations"] += [annotation(1, 999, "x"), {"id": 2, "image_id": 139}, annotation(3, 139, " ")]
    wrong = "annotation 5: there is no image 999; annotation 6: it lacks 'caption'; annotation 7: the caption is empty"
    with pytest.raises(ValueError, match=wrong):
        captions.read(write(tmp_path / "captions_val2017.json", stored))


def test_parti_prompts_keep_their_quotation_marks_and_categories(tmp_path):
    head = "Prompt\tCategory\tChallenge\tNote"
    rows = [
        'a sign that says "Hi"\tArts\tBasic\t',
        '"A" is a letter\tAbstract\tBasic\tx',
        "bond\tAbstract\tBasic\t",
        "",
    ]
    path = write(tmp_path / "PartiPrompts.tsv", "\r\n".join([head, *rows]))
    assert captions.read(path) == [
        captions.Caption('a sign that says "Hi"', 0, "Arts", "line 2"),
        captions.Caption('"A" is a letter', 1, "Abstract", "line 3"),
        captions.Caption("bond", 2, "Abstract", "line 4"),
    ]
    with pytest.raises(ValueError, match="bad rows: line 3: 1 columns; line 4: the prompt is empty"):
        captions.read(write(tmp_path / "PartiPrompts.tsv", f"{head}\nbond\tAbstract\nelement\n\tArts\n"))
    with pytest.raises(ValueError, match="first line lacks the title Category"):
        captions.read(write(tmp_path / "PartiPrompts.tsv", "Prompt\nbond\n"))


def test_json_lines_and_text_have_a_caption_a_line(tmp_path):
    lines = [{"text": "a\u2028b", "category": "x"}, {"text": " c "}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert captions.read(path) == [captions.Caption("a b", 0, "x", "line 1"), captions.Caption("c", 1, None, "line 3")]
    bad = '{"text": "a"}\n{"txt": "a"}\n[1]\n{"text": 3}\nhalf\n{"text": ""}\n{"a": 1}\n'
    wrong = (
        r"line 2: it lacks 'text'; line 3: it is not .*; line 5: it is no JSON; line 6: the text is empty; and 1 more"
    )
    with pytest.raises(ValueError, match=wrong):
        captions.read(write(tmp_path / "a.jsonl", bad))
    path = write(tmp_path / "a.txt", "\ufeffa red ball\n\n  a  cone \n")
    assert [(own.text, own.source) for own in captions.read(path)] == [("a red ball", "line 1"), ("a cone", "line 3")]
    assert [own.text for own in captions.read(path, 1)] == ["a red ball"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_line_ends_and_blank_lines_do_not_count(ending, encoding, tmp_path):
    path = tmp_path / "prompts.txt"
    joined = ending.join(["a red ball", "", "\ufeffa blue cone", "   ", ""])  # two files that were joined
    path.write_bytes(joined.encode(encoding))
    found = [captions.Caption("a red ball", 0, None, "line 1"), captions.Caption("a blue cone", 1, None, "line 3")]
    assert captions.read(path) == found


def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a red ball\na caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: it is no UTF-8 text"):
        captions.read(tmp_path / "a.txt")

    class Model:
        """Reads numbers; with a network of its own it takes long."""

        config = types.SimpleNamespace(encoder=None)
        asked = 0

        def encode(self, prompts):
            self.asked += 1
            return [int(prompt) for prompt in prompts]

    model, path = Model(), write(tmp_path / "b.txt", "1\n\ntwo\n")
    with pytest.raises(ValueError, match=r"b\.txt, line 3, 'two': invalid literal"):
        captions.check(model, captions.read(path), path)
    with pytest.raises(ValueError, match=r"^prompt 1, 'one': "):
        captions.check(model, ["one"])
    model.asked, model.config.encoder = 0, "T5"
    captions.check(model, captions.read(path), path)
    assert model.asked == 1


def test_scenes_are_those_of_their_seed(tmp_path):
    found = captions.read("scenes", 3, seed=5)
    assert [own.text for own in found] == data.random_captions(3, 5)
    assert [own.number for own in found] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "count", "message"),
    [
        ("none.txt", None, None, "there is no prompts file"),
        ("a.txt", "\n", None, "is empty"),
        ("a.txt", "a\n", 2, "has 1 prompts, and 2 are asked for"),
        ("a.txt", "a\n", 0, "count must be at least 1, not 0"),
        ("a.json", "[1", None, "no file of MS-COCO captions"),
        ("a.json", {"images": []}, None, "no file of MS-COCO captions.*'annotations'"),
        ("scenes", None, None, "say how many captions"),
    ],
)
def test_bad_files_are_refused(name, content, count, message, tmp_path):
    path = name if name == "scenes" else str(tmp_path / name)
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        captions.read(path, count)
