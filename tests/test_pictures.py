"""Pictures of every mode that Pillow opens, and damaged ones."""

import numpy as np
import pytest
from PIL import Image

from cascade_jax import pictures

RAMP = np.tile(np.linspace(0, 255, 16).round(), (4, 1))
COLOURS = Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 51)], -1).astype(np.uint8))
GREY = np.stack([RAMP] * 3, -1)
CLEAR = Image.fromarray(np.repeat([0, 255, 0, 255], 16).reshape(4, 16).astype(np.uint8))


def stored(path, image, **options):
    image.save(path, **options)
    return pictures.read(path)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = Image.fromarray((RAMP * 257).astype(np.uint16))
    assert deep.mode == "I;16"
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(stored(tmp_path / name, deep), GREY)
    swapped = Image.frombytes("I;16B", (16, 4), (RAMP * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(pictures.rgb(swapped), GREY)
    (tmp_path / "netpbm.png").write_bytes(b"P5 2 1 65535\n\x00\x00\x80\x00")
    np.testing.assert_array_equal(pictures.read(tmp_path / "netpbm.png")[0, :, 0], [0, 128])


def test_colours_of_every_mode_are_those_of_rgb(tmp_path):
    wanted = np.asarray(COLOURS)
    np.testing.assert_array_equal(stored(tmp_path / "rgb.png", COLOURS), wanted)
    np.testing.assert_array_equal(stored(tmp_path / "rgba.png", COLOURS.convert("RGBA")), wanted)
    np.testing.assert_array_equal(stored(tmp_path / "cmyk.tif", COLOURS.convert("CMYK")), wanted)
    np.testing.assert_array_equal(stored(tmp_path / "p.png", COLOURS.quantize(64)), wanted)
    np.testing.assert_allclose(stored(tmp_path / "cmyk.jpg", COLOURS.convert("CMYK")), wanted, atol=12)  # it is lossy
    np.testing.assert_array_equal(stored(tmp_path / "l.png", Image.fromarray(RAMP.astype(np.uint8))), GREY)
    two = stored(tmp_path / "1.png", Image.fromarray(RAMP > 100))
    np.testing.assert_array_equal(two, np.where(GREY > 100, 255, 0))
    for mode in ("HSV", "YCbCr", "RGBX"):
        np.testing.assert_allclose(pictures.rgb(COLOURS.convert(mode)), wanted, atol=4)  # their own rounding


def test_transparency_is_left_out(tmp_path):
    clear = COLOURS.copy()
    clear.putalpha(CLEAR)
    np.testing.assert_array_equal(stored(tmp_path / "rgba.png", clear), COLOURS)
    grey = Image.merge("LA", [Image.fromarray(RAMP.astype(np.uint8)), CLEAR])
    np.testing.assert_array_equal(stored(tmp_path / "la.png", grey), GREY)
    found = stored(tmp_path / "p.png", COLOURS.quantize(64), transparency=bytes(range(0, 256, 4)))
    np.testing.assert_array_equal(found, COLOURS)
    for mode in ("PA", "RGBa", "La"):
        np.testing.assert_array_equal(pictures.rgb(Image.new(mode, (2, 2))), np.zeros((2, 2, 3)))
    half = Image.new("RGBA", (1, 1), (200, 100, 50, 128))
    np.testing.assert_allclose(pictures.rgb(half.convert("RGBa")), [[[200, 100, 50]]], atol=1)  # its rounding


def test_numbers_without_a_scale_are_refused(tmp_path):
    for image in (Image.fromarray(RAMP.astype(np.float32)), Image.fromarray((RAMP * 257).astype(np.int32))):
        path = tmp_path / f"{image.mode}.tif"
        image.save(path)
        for look in (pictures.read, pictures.check):
            with pytest.raises(ValueError, match=rf"{path.name} is of Pillow's mode {image.mode}, whose scale"):
                look(path)


def test_a_damaged_picture_is_a_line_that_names_it(tmp_path):
    COLOURS.save(tmp_path / "whole.png")
    whole, causes = (tmp_path / "whole.png").read_bytes(), set()

    def refused(look, content):
        path = tmp_path / "bad.png"
        path.write_bytes(content)
        try:
            look(path)
        except ValueError as error:
            assert str(error).startswith(f"cannot read the picture {path}: ")
            assert len(str(error).splitlines()) == 1
            causes.add(type(error.__cause__))
            return True
        return False

    assert all(refused(pictures.check, whole[:at]) for at in range(len(whole) - 4))  # the last checksum aside
    changed = [whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :] for at in range(len(whole))]
    found = [refused(look, content) for look in (pictures.check, pictures.read) for content in changed]
    assert sum(found) > len(whole)
    assert SyntaxError in causes  # which Pillow raises, and nobody expects


def test_a_picture_is_cut_to_a_shape_around_its_middle(tmp_path):
    COLOURS.save(tmp_path / "a.png")
    assert pictures.read(tmp_path / "a.png", 8, 4).shape == (4, 8, 3)
    square = pictures.read(tmp_path / "a.png", 4)
    np.testing.assert_array_equal(square, np.asarray(COLOURS)[:, 6:10])
