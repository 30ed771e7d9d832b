"""Pixels: decoding, transparency, sizes, patches, numbering. tests/parity has the golden images.

test_parity replays the golden images.
"""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from opsd_jax import images
from opsd_jax.images import HARNESS_VIT, TRAINING, VAE, Resize, UnreadableImageError


def encoded(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(image, **options) -> bytes:
    return encoded(image, "PNG", **options)


def handmade_png(width, height, *, bits=8, colour=2, rows=b"") -> bytes:
    """What Pillow does not write: 16-bit colour (rows: filter byte and values), or sizes without
    any content.
    """

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


# --- opening --------------------------------------------------------------------------------------


def test_open_bytes_path_and_array(pixels, tmp_path):
    data = png(Image.fromarray(pixels))
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for source in (data, path, str(path), pixels):
        image = images.open_rgb(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("transparency", ["white", "drop"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_an_opened_image_is_read_like_its_file(mode, transparency, pixels, tmp_path):
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels[..., 0]))
    path, options = tmp_path / "image.tif", {}
    if mode == "P":  # a transparent colour of a palette
        image, path, options = image.quantize(8), tmp_path / "image.png", {"transparency": 3}
    image = image.convert(mode)
    image.save(path, **options)
    expected = np.asarray(images.open_rgb(path, transparency=transparency))
    with Image.open(path) as opened:
        assert opened.mode == mode
        for _ in range(2):  # it stays as it is, and open
            found = images.open_rgb(opened, transparency=transparency)
            assert found.mode == "RGB" and opened.mode == mode
            np.testing.assert_array_equal(np.asarray(found), expected)
    if mode in ("P", "RGBA", "LA"):
        other = images.open_rgb(path, transparency={"white": "drop", "drop": "white"}[transparency])
        assert (np.asarray(other) != expected).any()


def test_an_opened_image_of_16_bits_is_refused():
    with pytest.raises(UnreadableImageError, match="more than 8 bits, mode I;16: save it with 8"):
        images.open_rgb(Image.fromarray(np.full((4, 5), 999, np.uint16)))


HTML = b"<!DOCTYPE html><html>Not found</html>"


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "0 bytes"),
        (b"not an image", "12 bytes that begin with b'not an image'"),
        (HTML, "begin with b'<!DOCTYPE ht'"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "48 bytes"),
    ],
)
def test_unreadable_bytes(data, said, tmp_path):
    with pytest.raises(UnreadableImageError, match=f"{re.escape(said)}.*replace it"):
        images.open_rgb(data)
    path = tmp_path / "row 7.png"
    path.write_bytes(data)
    for source in (path, str(path)):
        with pytest.raises(UnreadableImageError, match=f"{re.escape(str(path))} .*replace it"):
            images.open_rgb(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_file(kind, pixels, tmp_path):
    data = encoded(Image.fromarray(pixels), kind)
    images.open_rgb(data)
    path = tmp_path / "cut"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableImageError, match=f"cannot decode {path} .*replace it"):
        images.open_rgb(path)
    with pytest.raises(
        UnreadableImageError, match=f"cannot decode an image of {len(data) // 2:,} bytes"
    ):
        images.open_rgb(path.read_bytes())


def test_any_damage_is_one_error(pixels):
    """Whatever a decoder raises on flipped bytes: NotImplementedError, struct.error, ..."""
    rng, refused = np.random.default_rng(0), 0
    for kind in ("PNG", "JPEG", "DDS"):
        data = encoded(Image.fromarray(pixels), kind)
        for _ in range(100):
            damaged = bytearray(data)
            damaged[rng.integers(8, min(len(data), 120))] = rng.integers(0, 256)
            try:
                assert images.open_rgb(bytes(damaged)).mode == "RGB"
            except UnreadableImageError:
                refused += 1
    assert refused > 50


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(UnreadableImageError, match=f"cannot decode {path} .*replace it"):
            images.open_rgb(path)


@pytest.mark.parametrize("data", [None, 3, [1, 2]])
def test_neither_bytes_nor_path_nor_array(data):
    with pytest.raises(UnreadableImageError, match=f"not {type(data).__name__}: replace it"):
        images.open_rgb(data)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((4, 5, 1), np.uint8),
        np.zeros((2, 4, 5, 3), np.uint8),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 3), np.int32),
        np.zeros((4, 5, 3), bool),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_another_kind(array):
    said = re.escape(f"not {array.dtype} {list(array.shape)}: convert it to 8-bit RGB")
    with pytest.raises(UnreadableImageError, match=said):
        images.open_rgb(array)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size, said",
    [
        ((20_000, 20_000), "400000000 pixels"),
        ((12_000, 10_000), "12000 x 10000 pixels"),
        ((89_478_486, 1), "89478486 x 1 pixels"),
    ],
)
def test_too_many_pixels(size, said, tmp_path):
    """Refused by the header alone: none of these files has any content to decode."""
    path = tmp_path / "large.png"
    path.write_bytes(handmade_png(*size))
    for source, name in ((path, path), (path.read_bytes(), "an image of")):
        with pytest.raises(
            UnreadableImageError,
            match=f"{name} .*{said}.*scale it down to at most 89,478,485 pixels",
        ):
            images.open_rgb(source)


def test_as_many_pixels_as_allowed():
    with pytest.raises(
        UnreadableImageError, match="cannot decode .*truncated"
    ):  # so it was not refused by its size
        images.open_rgb(handmade_png(9_459, 9_459, colour=0))


@pytest.mark.parametrize(
    "kind, values",
    [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32), ("TIFF", np.float32)],
)
def test_deep_grey_is_refused(kind, values):
    """Pillow would clip: 256, 32768 and 65535 of 65535 all become white."""
    data = encoded(Image.fromarray(np.array([[0, 256, 32768, 65535]]).astype(values)), kind)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0, :, 0], [0, 255, 255, 255])
    with pytest.raises(UnreadableImageError, match="more than 8 bits.*save it with 8"):
        images.open_rgb(data)


def test_deep_colour_keeps_the_high_bytes():
    values = [0x1234, 0x00FF, 0xFFFF, 0x8000, 0x7FFF, 0x0100]
    image = images.open_rgb(handmade_png(2, 1, bits=16, rows=b"\0" + struct.pack(">6H", *values)))
    np.testing.assert_array_equal(np.asarray(image).ravel(), [0x12, 0, 0xFF, 0x80, 0x7F, 1])


def test_animation_shows_its_first_frame(tmp_path):
    frames = [
        Image.new("RGB", (6, 4), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))
    ]
    path = tmp_path / "frames.gif"
    path.write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    with Image.open(path) as image:
        assert image.n_frames == 3
    for source in (path, path.read_bytes()):
        assert (np.asarray(images.open_rgb(source)) == (200, 0, 0)).all()


@pytest.mark.parametrize(
    "ink, colour",
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_cmyk_jpeg(ink, colour):
    data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    found = np.asarray(images.open_rgb(data)).astype(int)
    np.testing.assert_allclose(found, np.broadcast_to(colour, found.shape), atol=3)


def test_exif_orientation_is_ignored(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    data = png(Image.fromarray(pixels), exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert ImageOps.exif_transpose(image).size == (20, 30)
    np.testing.assert_array_equal(np.asarray(images.open_rgb(data)), pixels)


def test_transparency_is_one_of_two():
    with pytest.raises(ValueError, match="transparency is 'White': choose 'white' or 'drop'"):
        images.open_rgb(b"", transparency="White")


@pytest.mark.parametrize("transparency, left, middle", [("white", 255, 155), ("drop", 10, 10)])
def test_rgba(transparency, left, middle):
    """Colour 10 under alpha 0, about 0.4, and 1."""
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
    np.testing.assert_array_equal(
        np.asarray(images.open_rgb(data, transparency="drop"))[0, :, 0], [10, 10]
    )


def test_palette_with_transparent_index():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = png(image, transparency=0)
    np.testing.assert_array_equal(
        np.asarray(images.open_rgb(data))[0], [[255, 255, 255], [40, 50, 60]]
    )
    dropped = np.asarray(images.open_rgb(data, transparency="drop"))[0]
    np.testing.assert_array_equal(dropped, [[10, 20, 30], [40, 50, 60]])


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_opaque_modes(mode, pixels):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    image.save(buffer, "TIFF")
    opened = images.open_rgb(buffer.getvalue())
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


# --- sizes ----------------------------------------------------------------------------------------


def test_official_rules():
    assert TRAINING == Resize(14, 980, 378, 2_007_040)
    assert HARNESS_VIT == Resize(14, 980, 224, 1_806_336)
    assert VAE == Resize(16, 1024, 512, 1_806_336)


@pytest.mark.parametrize(
    "size, wanted, tokens",
    [
        ((192, 192), (378, 378), 729),
        ((256, 256), (378, 378), 729),
        ((384, 384), (378, 378), 729),
        ((512, 512), (518, 518), 1369),
        ((640, 480), (644, 476), 1564),
        ((1024, 768), (980, 728), 3640),
        ((1920, 1080), (980, 546), 2730),
        ((2000, 1000), (980, 490), 2450),
        ((3000, 2000), (980, 658), 3290),
        ((3000, 300), (980, 98), 490),
        ((20_000, 20_000), (980, 980), 4900),
    ],
)
def test_training_sizes(size, wanted, tokens):
    width, height = TRAINING(*size)
    assert (width, height) == wanted and width * height == tokens * 14**2
    assert TRAINING(*size[::-1]) == wanted[::-1]


@pytest.mark.parametrize(
    "rule, size, wanted",
    [
        (TRAINING, (1, 1), (378, 378)),  # the short side is scaled up
        (TRAINING, (800, 40), (980, 56)),  # the long-side rule undoes the short-side one
        (TRAINING, (371, 385), (378, 392)),  # 385 * 378 / 371 = 392.26
        (TRAINING, (1, 5000), (14, 980)),  # at least one stride
        (TRAINING, (20_000, 10), (980, 14)),
        (HARNESS_VIT, (64, 64), (224, 224)),
        (HARNESS_VIT, (192, 192), (224, 224)),
        (VAE, (1024, 512), (1024, 512)),
        (VAE, (1, 5000), (16, 1024)),
        (
            Resize(14, 140, 56, 11760),
            (980, 980),
            (84, 84),
        ),  # the pixel rule takes the ratio of AREAS: 140 * 0.6
    ],
)
def test_sizes(rule, size, wanted):
    assert rule(*size) == wanted


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels"):
        images.resize(Image.new("RGB", size), TRAINING)


@pytest.mark.parametrize(
    "size, wanted", [((1, 1), (378, 378)), ((1, 5000), (14, 980)), ((20_000, 10), (980, 14))]
)
def test_one_pixel_and_thin_images_are_legal(size, wanted):
    """They keep their colours: a constant stays, and so does the order from end to end."""
    flat = images.resize(images.open_rgb(png(Image.new("RGB", size, (9, 200, 31)))), TRAINING)
    assert flat.shape == (*wanted[::-1], 3) and (flat == (9, 200, 31)).all()
    ramp = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[::-1])
    pixels = images.resize(Image.fromarray(ramp).convert("RGB"), TRAINING).astype(int)
    assert pixels[-1, -1, 0] - pixels[0, 0, 0] >= 250 * (size != (1, 1))


def test_rounding_is_half_to_even():
    rule = Resize(stride=14, max_size=980, min_size=14)
    assert rule(35, 49) == (28, 56)  # 2.5 -> 2 and 3.5 -> 4 strides


def test_many_images_share_the_pixels():
    rule = HARNESS_VIT
    assert rule(980, 980) == (980, 980)
    assert rule(980, 980, num_images=2) == (924, 924)


def test_resize(pixels):
    image = Image.fromarray(pixels)
    resized = images.resize(
        image, Resize(stride=14, max_size=70, min_size=40)
    )  # twice as large: 60 x 40
    assert resized.dtype == np.uint8 and resized.shape == (42, 56, 3)
    np.testing.assert_array_equal(
        resized, np.asarray(image.resize((56, 42), Image.Resampling.BICUBIC))
    )
    same = images.resize(image, Resize(stride=10, max_size=30, min_size=20))
    np.testing.assert_array_equal(same, pixels)


@pytest.mark.parametrize("colour", [0, 1, 127, 255])
def test_resize_keeps_a_constant(colour):
    flat = Image.new("RGB", (51, 33), (colour,) * 3)
    assert (images.resize(flat, Resize(min_size=56, max_size=140)) == colour).all()


# --- the two resizes of inference -----------------------------------------------------------------


def bicubic(image, *sizes):
    """Pillow's own resizes, one after the other."""
    for size in sizes:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


@pytest.mark.parametrize(
    "size, vae, vit", [((192, 192), (512, 512), (518, 518)), ((640, 480), (688, 512), (686, 518))]
)
def test_two_stages(size, vae, vit, pixels):
    image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    for_vae, for_vit = images.two_stage(image, VAE, HARNESS_VIT)
    assert for_vae.dtype == for_vit.dtype == np.uint8
    np.testing.assert_array_equal(for_vae, bicubic(image, vae))  # the second VAE resize is none
    np.testing.assert_array_equal(for_vit, bicubic(image, vae, vit))
    assert (for_vit != bicubic(image, vit)).any()  # not what one resize to the same size gives
    assert (
        images.resize(image, HARNESS_VIT).shape != for_vit.shape
    )  # and one resize gives another size


def test_official_vae_resize_is_idempotent():
    rng = np.random.default_rng(0)
    for size in (10 ** rng.uniform(0, 4, (2000, 2))).astype(int).tolist():
        once = VAE(*size)
        assert VAE(*once) == once, size


def test_second_vae_resize_can_matter(pixels):
    """32 pixels are below 40, so this rule scales its own result up again: 37 x 80 -> 32 x 80 -> 32
    x 96.
    """
    rule, image = (
        Resize(stride=16, max_size=96, min_size=40),
        Image.fromarray(pixels).resize((37, 80)),
    )
    for_vae, for_vit = images.two_stage(image, rule, Resize(stride=14, max_size=980, min_size=28))
    np.testing.assert_array_equal(for_vae, bicubic(image, (32, 80), (32, 96)))
    np.testing.assert_array_equal(for_vit, bicubic(image, (32, 80), (28, 84)))  # from the first one


# --- patches --------------------------------------------------------------------------------------


def test_patchify_order():
    """2 x 3 patches of 2 x 2: row-major patches; inside row, column, rgb."""
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    patches = images.patchify(pixels, 2)
    assert patches.shape == (6, 12)
    np.testing.assert_array_equal(
        patches[0], [*pixels[0, 0], *pixels[0, 1], *pixels[1, 0], *pixels[1, 1]]
    )
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


# --- numbers --------------------------------------------------------------------------------------


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


def test_montage(pixels):
    """pixels: uint8 [20, 30, 3]."""
    small = np.zeros((5, 7, 3), np.uint8)
    found = images.montage([[pixels, small], [small]])
    assert found.shape == (25, 37, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[:20, :30], pixels)
    np.testing.assert_array_equal(found[:5, 30:], small)
    np.testing.assert_array_equal(found[20:, :7], small)
    assert (found[5:20, 30:] == 255).all() and (found[20:, 7:] == 255).all()
