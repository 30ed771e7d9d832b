"""Pixels: decoding, transparency, sizes, patches, numbering. test_parity replays the golden images."""

import io

import numpy as np
import pytest
from PIL import Image

from opsd_jax import images
from opsd_jax.images import Resize, UnreadableImage


def png(image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


# --- opening -------------------------------------------------------------------------------------------

def test_open_bytes_path_and_array(pixels, tmp_path):
    data = png(Image.fromarray(pixels))
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for source in (data, path, str(path), pixels):
        image = images.open_rgb(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_unreadable_bytes(data):
    with pytest.raises(UnreadableImage, match="replace it or leave the row out"):
        images.open_rgb(data)


def test_truncated_file(pixels):
    with pytest.raises(UnreadableImage):
        images.open_rgb(png(Image.fromarray(pixels))[:-200])


def test_missing_file(tmp_path):
    with pytest.raises((UnreadableImage, FileNotFoundError), match="absent.png"):
        images.open_rgb(tmp_path / "absent.png")


@pytest.mark.parametrize("transparency, left, middle", [("white", 255, 155), ("drop", 10, 10)])
def test_rgba(transparency, left, middle):
    """Colour 10 behind alpha 0, about 0.4, and 1."""
    rgba = np.full((1, 3, 4), 10, np.uint8)
    rgba[0, :, 3] = 0, 104, 255
    image = images.open_rgb(png(Image.fromarray(rgba)), transparency=transparency)
    assert image.mode == "RGB"
    found = np.asarray(image)[0]
    np.testing.assert_array_equal(found[0], left)
    np.testing.assert_allclose(found[1].astype(int), middle, atol=1)
    np.testing.assert_array_equal(found[2], 10)


def test_grey_with_alpha():
    grey = np.array([[[10, 0], [10, 255]]], np.uint8)
    data = png(Image.fromarray(grey))
    np.testing.assert_array_equal(np.asarray(images.open_rgb(data))[0, :, 0], [255, 10])
    np.testing.assert_array_equal(np.asarray(images.open_rgb(data, transparency="drop"))[0, :, 0], [10, 10])


def test_palette_with_transparent_index():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = png(image, transparency=0)
    np.testing.assert_array_equal(np.asarray(images.open_rgb(data))[0], [[255, 255, 255], [40, 50, 60]])
    dropped = np.asarray(images.open_rgb(data, transparency="drop"))[0]
    np.testing.assert_array_equal(dropped, [[10, 20, 30], [40, 50, 60]])


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_opaque_modes(mode, pixels):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    image.save(buffer, "TIFF")
    opened = images.open_rgb(buffer.getvalue())
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


# --- sizes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, size, wanted", [
    (Resize(max_pixels=2007040), (378, 378), (378, 378)),
    (Resize(max_pixels=2007040), (640, 480), (644, 476)),
    (Resize(max_pixels=2007040), (1, 1), (378, 378)),  # the short side is scaled up
    (Resize(max_pixels=2007040), (3000, 2000), (980, 658)),  # the long side is scaled down
    (Resize(max_pixels=2007040), (800, 40), (980, 56)),  # the long-side rule undoes the short-side one
    (Resize(max_pixels=2007040), (371, 385), (378, 392)),  # 385 * 378 / 371 = 392.26
    (Resize(min_size=224), (64, 64), (224, 224)),  # inference
    (Resize(stride=16, max_size=1024, min_size=512), (1024, 512), (1024, 512)),  # VAE
    (Resize(14, 140, 56, 11760), (980, 980), (84, 84)),  # the pixel rule takes the ratio of AREAS: 140 * 0.6
])
def test_sizes(rule, size, wanted):
    assert rule(*size) == wanted


def test_rounding_is_half_to_even():
    rule = Resize(stride=14, max_size=980, min_size=14)
    assert rule(35, 49) == (28, 56)  # 2.5 -> 2 and 3.5 -> 4 strides


def test_many_images_share_the_pixels():
    rule = Resize(min_size=224)
    assert rule(980, 980) == (980, 980)
    assert rule(980, 980, num_images=2) == (924, 924)


def test_resize(pixels):
    image = Image.fromarray(pixels)
    resized = images.resize(image, Resize(stride=14, max_size=70, min_size=40))  # twice as large: 60 x 40
    assert resized.dtype == np.uint8 and resized.shape == (42, 56, 3)
    np.testing.assert_array_equal(resized, np.asarray(image.resize((56, 42), Image.Resampling.BICUBIC)))
    same = images.resize(image, Resize(stride=10, max_size=30, min_size=20))
    np.testing.assert_array_equal(same, pixels)


@pytest.mark.parametrize("colour", [0, 1, 127, 255])
def test_resize_keeps_a_constant(colour):
    flat = Image.new("RGB", (51, 33), (colour,) * 3)
    assert (images.resize(flat, Resize(min_size=56, max_size=140)) == colour).all()


# --- patches -------------------------------------------------------------------------------------------

def test_patchify_order():
    """2 x 3 patches of 2 x 2: row-major patches; inside row, column, rgb."""
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    patches = images.patchify(pixels, 2)
    assert patches.shape == (6, 12)
    np.testing.assert_array_equal(patches[0], [*pixels[0, 0], *pixels[0, 1], *pixels[1, 0], *pixels[1, 1]])
    np.testing.assert_array_equal(patches[1, :3], pixels[0, 2])
    np.testing.assert_array_equal(patches[3, :3], pixels[2, 0])


def test_unpatchify_inverts(pixels):
    for patch in (1, 2, 5, 10):
        patches = images.patchify(pixels, patch)
        back = images.unpatchify(patches, (20 // patch, 30 // patch), patch)
        np.testing.assert_array_equal(back, pixels)
        assert back.dtype == pixels.dtype


def test_patchify_needs_whole_patches(pixels):
    with pytest.raises(ValueError, match="20x30.*patches of 7"):
        images.patchify(pixels, 7)


# --- numbers -------------------------------------------------------------------------------------------

def test_position_ids():
    ids = images.position_ids((2, 3), 10)
    np.testing.assert_array_equal(ids, [0, 1, 2, 10, 11, 12])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(images.position_ids((3, 3), 3), np.arange(9))


@pytest.mark.parametrize("grid", [(11, 2), (2, 11)])
def test_grid_beyond_the_table(grid):
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} patches exceeds the 10x10"):
        images.position_ids(grid, 10)


def test_interpolated_position_ids():
    """A grid of any size is spread over the whole table; a full grid is numbered as usual."""
    np.testing.assert_array_equal(images.interpolated_position_ids((1, 2), 10), [0, 5])
    for side in (7, 10, 70):
        ids = images.interpolated_position_ids((side, side), side)
        np.testing.assert_array_equal(ids, np.arange(side * side))
    assert images.interpolated_position_ids((40, 40), 10).max() == 99
