"""Golden set `preprocess`: decoding, resizing, patches and position ids of images."""

import functools
import hashlib

import jax.numpy as jnp
import numpy as np
from PIL import Image as PillowImage

from opsd_jax import images
from parity.replay import compare, equal, matching, read


def resize_rules(facts):
    return {
        name: images.Resize(
            stride=rule["image_stride"],
            max_size=rule["max_image_size"],
            min_size=rule["min_image_size"],
            max_pixels=rule.get("max_pixels", facts["default_max_pixels"]),
        )
        for name, rule in facts["transforms"].items()
    }


def test_preprocess_images(goldens):
    """PNG -> RGB on white -> resized uint8 -> normalised -> patches, bit by bit up to the
    normalisation.
    """
    tensors, facts = read(goldens, "preprocess", "preprocess")
    rules = resize_rules(facts)

    def path_to(name):
        return goldens / "preprocess" / f"{name}.png"

    rows = [
        row for row in facts["images"] if path_to(row["image"]).exists()
    ]  # a copy may leave out images
    assert rows
    for row in rows:
        name, transform = row["image"], row["transform"]
        path = path_to(name)
        with PillowImage.open(path) as file:
            assert (file.mode, [file.height, file.width]) == (row["png_mode"], row["orig_hw"])
        image = images.open_rgb(path.read_bytes())
        if f"{name}.rgb_sample" in tensors:
            rgb = np.asarray(image)
            down, right = (max(1, n // 8) for n in rgb.shape[:2])
            equal(rgb[::down, ::right], tensors[f"{name}.rgb_sample"], err_msg=name)
        rule, label = rules[transform], f"{name}.{transform}"
        pixels = images.resize(image, rule)
        assert list(pixels.shape[:2]) == row["out_hw"], label
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == row["sha256_resized_u8_hwc"], label
        if f"{label}.resized_u8_hwc" in tensors:
            equal(pixels, tensors[f"{label}.resized_u8_hwc"], err_msg=label)
        near = functools.partial(np.testing.assert_allclose, rtol=0, err_msg=label)
        values = np.asarray(images.normalize(jnp.asarray(pixels))).transpose(2, 0, 1)
        near(values.mean((1, 2), np.float64), row["mean"], atol=1e-5)
        near(values.std((1, 2), np.float64, ddof=1), row["std"], atol=1e-5)
        if f"{label}.tensor" in tensors:
            near(values, tensors[f"{label}.tensor"], atol=3e-7)
        down, right = (max(1, n // 8) for n in pixels.shape[:2])
        if f"{label}.sample_tensor" in tensors:
            near(values[:, ::down, ::right], tensors[f"{label}.sample_tensor"], atol=3e-7)
        patches = images.patchify(pixels, rule.stride)
        assert len(patches) == row["n_patches"], label
        if f"{label}.patchified" in tensors:
            near(images.normalize(jnp.asarray(patches)), tensors[f"{label}.patchified"], atol=3e-7)


def test_preprocess_sizes(goldens):
    _, facts = read(goldens, "preprocess", "preprocess")
    rules, grid = resize_rules(facts), facts["resize_shape_grid"]
    assert grid["rows"]
    for row in grid["rows"]:
        case = dict(zip(grid["columns"], row, strict=True))
        size = rules[case["transform"]](case["w"], case["h"], case["img_num"])
        assert size == (case["out_w"], case["out_h"]), case


def test_preprocess_patchify(goldens):
    tensors, _ = read(goldens, "preprocess", "preprocess")
    cases = matching(tensors, r"patchify_out(\d*)_p(\d+)")
    assert cases
    for match, wanted in cases:
        pixels = tensors[f"patchify_in{match[1]}"].transpose(1, 2, 0)
        patch = int(match[2])
        equal(images.patchify(pixels, patch), wanted, err_msg=match[0])
        grid = (pixels.shape[0] // patch, pixels.shape[1] // patch)
        equal(images.unpatchify(wanted, grid, patch), pixels, err_msg=match[0])


def test_preprocess_position_ids(goldens):
    tensors, facts = read(goldens, "preprocess", "preprocess")
    assert facts["position_ids"]
    for row in facts["position_ids"]:
        grid, side = (row["grid_h"], row["grid_w"]), row["max_num_patches_per_side"]
        name = f"pos.{row['index']}"
        compare(equal, images.position_ids(grid, side), tensors, f"{name}.extrapolate")
        if row["interpolate_len_ok"]:  # the official rounding can give one row or column too many
            compare(
                equal, images.interpolated_position_ids(grid, side), tensors, f"{name}.interpolate"
            )
