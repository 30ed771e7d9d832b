"""Images are decoded, resized, cut into numbered patches, and put together again.

This module uses NumPy and Pillow, and no model. Official: data/transforms.py, data/data_utils.py.
The resize works on uint8 pixels with Pillow's antialiased bicubic filter, so what the model sees
was quantised to uint8 first. Patches stay uint8 until they are on the device, where `normalize`
maps them to [-1, 1].

Axes: H, W pixels (height, width), P patches.
"""

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import Annotated, Any

import einops
import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8
from PIL import Image, ImageFilter, UnidentifiedImageError

from opsd_jax.inputs import checks

LARGEST = 89_478_485  # pixels: a quarter of a GiB as RGB, the size above which Pillow warns


class UnreadableImageError(ValueError):
    """Data that cannot be read as an image.

    Its bytes cannot be decoded by Pillow, it has too many pixels, or it is an array of another
    type or shape.
    """


@dataclasses.dataclass(frozen=True)
class Resize:
    """The size rule of one image transform, in pixels.

    The official rules are TRAINING (the defaults), HARNESS_VIT and VAE. Every image of at least
    one pixel is accepted: 1 x 5,000 becomes 14 x 980.

    stride: both sides are multiples of it.
    max_size, min_size: bounds of the longer and of the shorter side.
    max_pixels: bound of the number of pixels, divided among the images of an example.
    """

    stride: Annotated[int, "[1, inf)"] = 14
    max_size: Annotated[int, "[1, inf)"] = 980
    min_size: Annotated[int, "[1, inf)"] = 378
    max_pixels: Annotated[int, "[1, inf)"] = 2_007_040

    def __post_init__(self):
        checks.fields(self, "images")

    def __call__(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """(width, height) of the resized image, in pixels.

        Three peculiarities of the official code are kept. Both roundings are Python's (half to
        even). The pixel rule multiplies the sides by the ratio of areas, not by its square root.
        The long-side rule comes last and may undo the short-side rule.

        Args:
          width, height: size of the image in pixels.
          num_images: number of images that share `max_pixels`.
        Raises:
          ValueError: an image without pixels.
        """
        if min(width, height) < 1:
            raise ValueError(
                f"an image of {width} x {height} pixels has nothing to resize: replace it"
            )

        def snap(x):
            return max(self.stride, round(x / self.stride) * self.stride)

        def scaled(w, h, scale):
            return snap(round(w * scale)), snap(round(h * scale))

        scale = max(
            min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height)
        )
        w, h = scaled(width, height, scale)
        if w * h > self.max_pixels / num_images:
            w, h = scaled(w, h, self.max_pixels / num_images / (w * h))
        if max(w, h) > self.max_size:
            w, h = scaled(w, h, self.max_size / max(w, h))
        return w, h


@dataclasses.dataclass(frozen=True)
class SmartResize:
    """The size rule of Qwen2.5-VL and Qwen3-VL (official: transformers, smart_resize), in pixels.

    stride: both sides are multiples of it: the pixels along a side of a token.
    min_pixels, max_pixels: bounds of the number of pixels of each image. The defaults are those of
      Qwen2.5-VL; Qwen3-VL has 65,536 and 16,777,216.
    """

    stride: Annotated[int, "[1, inf)"] = 28
    min_pixels: Annotated[int, "[1, inf)"] = 3136
    max_pixels: Annotated[int, "[1, inf)"] = 12_845_056

    def __post_init__(self):
        checks.fields(self, "images")
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"images.min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}: "
                "lower the first or raise the second"
            )

    def __call__(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """(width, height) of the resized image, in pixels.

        The first rounding is Python's (half to even).

        Args:
          width, height: size of the image in pixels.
          num_images: not used: each image has the bounds for itself.
        Raises:
          ValueError: an image without pixels, or with one side more than 200 times the other.
        """
        if min(width, height) < 1:
            raise ValueError(
                f"an image of {width} x {height} pixels has nothing to resize: replace it"
            )
        if max(width, height) > _MOST_ASPECT * min(width, height):
            raise ValueError(
                f"an image of {width} x {height} pixels has one side more than {_MOST_ASPECT} "
                "times the other, which the processor of Qwen's models refuses: crop it or leave "
                "the row out"
            )
        sides = height, width  # in the official order of factors: floats are rounded
        h, w = (round(side / self.stride) * self.stride for side in sides)
        if h * w > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            h, w = (max(1, math.floor(x / scale / self.stride)) * self.stride for x in sides)
        elif h * w < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            h, w = (math.ceil(x * scale / self.stride) * self.stride for x in sides)
        return w, h


_MOST_ASPECT = 200

TRAINING = Resize()
"""What the ViT sees in training, for student and teacher alike: one resize, on loading
(data/opsd_paired_dataset.py). EVAL.md gives these numbers for evaluation too, but the evaluation
wrapper uses others."""

HARNESS_VIT = Resize(stride=14, max_size=980, min_size=224, max_pixels=14 * 14 * 9 * 1024)
"""What the ViT sees in the evaluation wrapper and inferencer.py, after the rule VAE (`two_stage`).
Small images become larger than in training: 192 x 192 -> 512 x 512 -> 518 x 518, in training
378 x 378."""

VAE = Resize(stride=16, max_size=1024, min_size=512, max_pixels=14 * 14 * 9 * 1024)
"""What the autoencoder sees, and the first resize of inference. The stride is 16 because a latent
covers 8 pixels and a latent token 2 latents along each side."""


def open_rgb(data: object, *, transparency: str = "white") -> Image.Image:
    """A Pillow RGB image of encoded bytes, a path, a Pillow image, or a uint8 array [H, W, 3].

    As in the official code, the EXIF orientation is ignored, the first frame of an animation is
    used, and the high bytes of 16-bit RGB. Grey values of more than 8 bits are refused, because
    Pillow would clip them all to white.

    Args:
      transparency: "white" composites on white, as the helper of the official code does (but that
        helper overlooks grey with alpha). "drop" keeps the raw colour of transparent pixels, which
        is what the official training loader does: it calls `.convert("RGB")` before the helper.
    Raises:
      UnreadableImageError: the data cannot be read as an image. The message has the path, if the
        data is one.
      ValueError: another `transparency`.
    """
    if transparency not in ("white", "drop"):
        raise ValueError(f"transparency is {transparency!r}: choose 'white' or 'drop'")
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[-1] != 3 or not data.size:
            raise UnreadableImageError(
                f"an image as an array is uint8 [height, width, 3], not {data.dtype} "
                f"{list(data.shape)}: convert it to 8-bit RGB"
            )
        return Image.fromarray(data)
    source: str | io.BytesIO = ""
    if isinstance(data, Image.Image):
        name = f"an image of {data.width} x {data.height} pixels"
    elif isinstance(data, bytes):
        name = f"an image of {len(data):,} bytes that begin with {data[:12]!r}"
        source = io.BytesIO(data)
    elif isinstance(data, (str, os.PathLike)):
        name = source = os.fspath(data)
    else:
        raise UnreadableImageError(
            "an image is encoded bytes, a path, a Pillow image or an array, not "
            f"{type(data).__name__}: replace it"
        )
    try:
        if isinstance(data, Image.Image):
            return _in_rgb(data, transparency)
        with Image.open(source) as image:
            return _in_rgb(image, transparency)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise UnreadableImageError(
            f"{name} is too large ({e}): scale it down to at most {LARGEST:,} pixels"
        ) from e
    except Exception as e:  # decoders raise arbitrary exceptions on damaged bytes
        known = not isinstance(e, UnidentifiedImageError)
        reason = f"{type(e).__name__}: {e}" if known else "not an image format that Pillow knows"
        raise UnreadableImageError(f"cannot decode {name} ({reason}): replace it") from e


def _in_rgb(image: Image.Image, transparency: str) -> Image.Image:
    """An opened image as `open_rgb` gives it."""
    if image.width * image.height > LARGEST:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if image.mode[0] in "IF":
        raise ValueError(
            f"its grey values have more than 8 bits, mode {image.mode}: save it with 8"
        )
    image.load()
    if transparency == "white" and image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image in pixels, from its header: nothing is decoded.

    Raises:
      UnreadableImageError: it has no header that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as e:  # as in `open_rgb`
        raise UnreadableImageError(
            f"cannot read the size of an image of {len(data):,} bytes that begin with "
            f"{data[:12]!r} ({type(e).__name__}: {e}): replace it"
        ) from e


Rule = Resize | SmartResize
"""The size rule of a model's images."""


def resize(image: Image.Image, rule: Rule, num_images: int = 1) -> UInt8[np.ndarray, "H W 3"]:
    """A Pillow RGB image resized with the bicubic filter: uint8 [H, W, 3].

    Args:
      rule: gives the size.
      num_images: number of images that share the rule's `max_pixels`.
    Raises:
      ValueError: an image without pixels.
    """
    size = rule(*image.size, num_images)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


TRANSFORMS = ("crop", "blur", "low_resolution")


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Parameters of the image transforms, which change what a context shows of an image.

    crop: the part of the image inside a box, resized by the size rule of all images, so that a
      small part is seen enlarged.
    blur: after resizing, each pixel is the mean of the square of 2 * blur + 1 pixels around it;
      the image is continued by its edge.
    low_resolution: after resizing, both sides are divided by this number (means of squares) and
      multiplied again (bicubic). The number of patches stays the same.

    crop: left, top, right and bottom as shares of width and height. It covers every pixel that it
      touches.
    crop_metadata: key of an example's metadata that holds its own box; "" for the same box for all.
    blur, low_resolution: in pixels.
    """

    crop: Annotated[tuple[float, ...], "[0, 1]"] = (0.25, 0.25, 0.75, 0.75)
    crop_metadata: str = ""
    blur: Annotated[int, "[1, 512]"] = 4
    low_resolution: Annotated[int, "[2, 512]"] = 4

    def __post_init__(self):
        checks.fields(self, "transforms")
        if fault := box_fault(self.crop):
            raise ValueError(f"crop is {self.crop}, which {fault}")

    def box(self, width: int, height: int, box: Sequence[float] = ()) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a crop in pixels; `box` instead of `crop` if given."""
        left, top, right, bottom = box or self.crop
        return (
            int(left * width),
            int(top * height),
            min(math.ceil(right * width), width),
            min(math.ceil(bottom * height), height),
        )

    def size(
        self, name: str, size: tuple[int, int], rule: Rule, box: Sequence[float] = ()
    ) -> tuple[int, int]:
        """(width, height) of what `__call__` makes of an image of this size, in pixels."""
        if name == "crop":
            left, top, right, bottom = self.box(*size, box)
            size = right - left, bottom - top
        return rule(*size)

    def __call__(
        self, name: str, image: Image.Image, rule: Rule, box: Sequence[float] = ()
    ) -> UInt8[np.ndarray, "H W 3"]:
        """A Pillow RGB image after a transform and resizing: uint8 [H, W, 3].

        Args:
          name: one of `TRANSFORMS`.
          rule: gives the size.
          box: a crop of its own; empty for `crop`.
        Raises:
          ValueError: another name.
        """
        if name == "crop":
            return resize(image.crop(self.box(*image.size, box)), rule)
        resized = Image.fromarray(resize(image, rule))
        if name == "blur":
            return np.asarray(resized.filter(ImageFilter.BoxBlur(self.blur)))
        if name == "low_resolution":
            small = [max(1, side // self.low_resolution) for side in resized.size]
            reduced = resized.resize((small[0], small[1]), Image.Resampling.BOX)
            return np.asarray(reduced.resize(resized.size, Image.Resampling.BICUBIC))
        raise ValueError(
            f"there is no image transform {name!r}: {checks.choose_from(name, TRANSFORMS)}"
        )


def box_fault(box: object) -> str | None:
    """What is wrong with a crop's box; None for four shares (left, top, right, bottom)."""
    if not (
        isinstance(box, (tuple, list))
        and len(box) == 4
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in box)
        and all(0 <= x <= 1 for x in box)
    ):
        return "is not left, top, right, bottom, each in [0, 1]"
    if box[0] >= box[2] or box[1] >= box[3]:
        return "is empty: left must be below right, and top below bottom"
    return None


def in_proportion(rule: Resize, stride: int, size: int, released: int) -> Resize:
    """A size rule for a model with a smaller or larger position table than the released model's.

    Args:
      rule: the size rule of the released model.
      stride: the new rule's stride, in pixels.
      size: side in pixels of the largest image that the model's position table holds.
      released: the same for the released model: 70 patches of 14 = 980 pixels, or 64 latent tokens
        of 16 = 1,024 pixels.
    """
    scale = size / released
    return Resize(
        stride,
        round(rule.max_size * scale),
        round(rule.min_size * scale),
        round(rule.max_pixels * scale**2),
    )


def vae_rule(generation) -> Resize:
    """The size rule of what the autoencoder sees, the same in training and inference.

    Args:
      generation: GenerationConfig, the sizes of the model.
    """
    return in_proportion(VAE, generation.stride, generation.side * generation.stride, 1024)


def two_stage(
    image: Image.Image, vae_rule: Resize, vit_rule: Resize
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "h w 3"]]:
    """The two inputs that the inference pipeline makes of a Pillow RGB image.

        image -vae_rule-> uint8 -vit_rule-> ViT pixels
                                -vae_rule-> VAE pixels

    Both resizes round to uint8, so the ViT does not see what one resize would give. The second VAE
    resize changes nothing with `VAE` itself, but it does with a rule that gives another size when
    it is applied to its own result. Text-only answers skip the VAE, but not its resize.
    Official: inferencer.py (interleave_inference, then the transforms in bagel.py).

    Returns:
      (VAE pixels, ViT pixels), uint8 [H, W, 3] and [h, w, 3].
    """
    first = Image.fromarray(resize(image, vae_rule))
    return resize(first, vae_rule), resize(first, vit_rule)


def patchify(
    pixels: Shaped[np.ndarray, "H W 3"], patch: int, merge: int = 1
) -> Shaped[np.ndarray, "P C"]:
    """Cuts an image into square patches of p = `patch` pixels per side.

    Args:
      pixels: [H, W, 3].
      merge: patches along a side of a merge block, whose patches follow one another.
    Returns:
      [P, p * p * 3] with P = H/p * W/p patches: merge blocks in row-major order, and in a block its
      patches in row-major order. The order inside a patch is row, column, rgb (rgb fastest).
    Raises:
      ValueError: H or W is not a multiple of p * merge.
    """
    h, w, _ = pixels.shape
    if h % (patch * merge) or w % (patch * merge):
        raise ValueError(
            f"an image of {h}x{w} pixels does not divide into patches of {patch * merge}: "
            "check the resize stride"
        )
    return einops.rearrange(
        pixels, "(h m p) (w n q) c -> (h w m n) (p q c)", m=merge, n=merge, p=patch, q=patch
    )


def cells(grid: tuple[int, int], merge: int) -> Int32[np.ndarray, "P 4"]:
    """Row and column of each patch, and the rows and columns of its image: int32 [P, 4].

    The patches are in the order of `patchify`.

    Args:
      grid: numbers of rows and columns of patches. merge: patches along a side of a merge block.
    """
    ordered = einops.rearrange(np.indices(grid), "x (h m) (w n) -> (h w m n) x", m=merge, n=merge)
    return np.concatenate([ordered, np.broadcast_to(grid, ordered.shape)], axis=1).astype(np.int32)


def normalize(pixels: Any) -> Any:
    """Pixels or patches in [-1, 1]: (x / 255 - 0.5) / 0.5 of uint8 values.

    Args:
      pixels: uint8 [...] of NumPy or JAX, which this module does not import. Floats are taken as
        normalised and returned unchanged.
    Returns:
      float32 [...], or the floats.
    """
    if pixels.dtype != np.uint8:
        return pixels
    return (pixels.astype(np.float32) / 255 - 0.5) / 0.5


def pixel_values(
    patches: UInt8[np.ndarray, "P C"],
    mean: Sequence[float],
    std: Sequence[float],
    frames: int = 2,
) -> Float32[np.ndarray, "P _"]:
    """Patches as the processors of Qwen2.5-VL and Qwen3-VL return them: float32 [P, frames * C].

    The model itself takes uint8 patches of one frame, normalises them on the device and adds up the
    kernels of the frames (`model.qwen_vision`).

    Args:
      patches: uint8 [P, C] in merge blocks, see `patchify`.
      mean, std: of the three channels, in [0, 1].
      frames: of a patch (temporal patch). A still image is repeated.
    Returns:
      (value / 255 - mean) / std; the order in a patch is channel, frame, row, column.
    """
    values = einops.rearrange(patches, "P (pixel c) -> P c pixel", c=3)
    scaled = (values.astype(np.float64) * (1 / 255)).astype(np.float32)
    centre, scale = (np.asarray(x, np.float32)[:, None] for x in (mean, std))
    return einops.repeat((scaled - centre) / scale, "P c pixel -> P (c t pixel)", t=frames)


def unpatchify(
    patches: Shaped[np.ndarray, "P C"], grid: tuple[int, int], patch: int, merge: int = 1
) -> Shaped[np.ndarray, "H W 3"]:
    """Inverse of `patchify`.

    Args:
      patches: [P, p * p * 3].
      grid: numbers of rows and columns of patches, P = rows * columns.
      patch: p, pixels per side of a patch.
      merge: patches along a side of a merge block.
    Returns:
      [H, W, 3].
    """
    rows, columns = (count // merge for count in grid)
    sizes = {"h": rows, "w": columns, "m": merge, "n": merge, "p": patch, "q": patch}
    return einops.rearrange(patches, "(h w m n) (p q c) -> (h m p) (w n q) c", **sizes)


def position_ids(grid: tuple[int, int], side: int) -> Int32[np.ndarray, " P"]:
    """Ids in a position table: row * side + column (official: "extrapolate").

    side 10, grid 2 x 3:   0  1  2
                          10 11 12

    Args:
      grid: numbers of rows and columns of patches.
      side: number of rows, and of columns, of the position table.
    Returns:
      int32 [rows * columns].
    Raises:
      ValueError: the grid is larger than the table.
    """
    rows, columns = grid
    if rows > side or columns > side:
        raise ValueError(
            f"an image of {rows}x{columns} patches exceeds the {side}x{side} position table: "
            "lower images.max_size or use a model with a larger table"
        )
    return (np.arange(rows)[:, None] * side + np.arange(columns)).reshape(-1).astype(np.int32)


def interpolated_position_ids(grid: tuple[int, int], side: int) -> Int32[np.ndarray, " P"]:
    """Ids in a position table by the official alternative, "interpolate".

    The fractions i/rows and j/columns are sorted into `side` equal bins. They are rounded to
    float32 as in the official code: in float64 a full grid would not be numbered 0, 1, 2, ...

    Args:
      grid, side: as in `position_ids`.
    Returns:
      int32 [rows * columns].
    """
    bins = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    row, column = (
        np.searchsorted(bins, (np.arange(n) * (1 / n)).astype(np.float32), side="right")
        for n in grid
    )
    return (row[:, None] * side + column).reshape(-1).astype(np.int32)


def montage(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Images arranged in rows on white, for a human viewer.

    Args:
      rows: uint8 [H, W, 3] images of each row, of any sizes; the images of a row are aligned at the
        top, the rows at the left.
    Returns:
      uint8 [sum of the rows' heights, width of the widest row, 3].
    """
    heights = [max(image.shape[0] for image in row) for row in rows]
    widths = [sum(image.shape[1] for image in row) for row in rows]
    canvas = np.full((sum(heights), max(widths), 3), 255, np.uint8)
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for image in row:
            canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
            left += image.shape[1]
        top += height
    return canvas
