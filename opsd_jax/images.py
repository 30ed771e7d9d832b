"""Pixels -> resized, cut into patches, numbered; and back. NumPy and Pillow, no model.

Official: data/transforms.py, data/data_utils.py. The resize works on uint8 pixels with Pillow's antialiased
bicubic filter, so what the model sees was quantised to uint8 first; patches stay uint8 until they are on the
device, where `bagel.normalize_patches` maps them to [-1, 1].
"""

import dataclasses
import io

import einops
import numpy as np


class UnreadableImage(ValueError):
    """An image whose bytes Pillow cannot decode."""


@dataclasses.dataclass(frozen=True)
class Resize:
    """The size rule of one image transform; sizes in pixels.

    Official training: stride 14, max_size 980, min_size 378, max_pixels 2,007,040; the inference wrapper: 980, 224
    and the class default of max_pixels, 14 * 14 * 9 * 1024.
    """

    stride: int = 14
    max_size: int = 980
    min_size: int = 378
    max_pixels: int = 14 * 14 * 9 * 1024

    def __call__(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """(width, height) of the resized image.

        Quirks that are kept: both roundings are Python's (half to even); the pixel rule multiplies the sides by
        the ratio of areas, not by its square root; the long-side rule comes last and may undo the short-side one.
        """

        def scaled(w, h, scale):
            snap = lambda x: max(self.stride, round(x / self.stride) * self.stride)
            return snap(round(w * scale)), snap(round(h * scale))

        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        w, h = scaled(width, height, scale)
        if w * h > self.max_pixels / num_images:
            w, h = scaled(w, h, self.max_pixels / num_images / (w * h))
        if max(w, h) > self.max_size:
            w, h = scaled(w, h, self.max_size / max(w, h))
        return w, h


def open_rgb(data, *, transparency: str = "white"):
    """Encoded bytes, a path, or a uint8 array [H, W, 3] -> Pillow RGB image.

    `transparency`: "white" composites on white (the helper of the official code); "drop" keeps the raw colour of
    transparent pixels, which is what its training loader really does: `.convert("RGB")` comes before the helper.
    Raises UnreadableImage.
    """
    from PIL import Image

    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        image.load()
    except (OSError, SyntaxError, ValueError) as e:
        raise UnreadableImage(f"cannot decode the image ({e}): replace it or leave the row out") from e
    has_alpha = image.mode in ("RGBA", "LA") or "transparency" in image.info
    if transparency == "white" and has_alpha:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def resize(image, rule: Resize, num_images: int = 1) -> np.ndarray:
    """Pillow RGB image -> uint8 [H, W, 3] of the rule's size (bicubic)."""
    from PIL import Image

    size = rule(*image.size, num_images)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """[H, W, 3] -> patches [H/p * W/p, p * p * 3], row-major; inside a patch row, column, rgb (rgb fastest)."""
    h, w, _ = pixels.shape
    if h % patch or w % patch:
        raise ValueError(f"an image of {h}x{w} pixels does not divide into patches of {patch}: check the resize stride")
    return einops.rearrange(pixels, "(h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """Inverse of `patchify`: [N, p * p * 3] -> [H, W, 3], grid = (rows, columns)."""
    rows, columns = grid
    return einops.rearrange(patches, "(h w) (p q c) -> (h p) (w q) c", h=rows, w=columns, p=patch, q=patch)


def position_ids(grid: tuple[int, int], side: int) -> np.ndarray:
    """int32 [rows * columns]: row * side + column, ids of the position tables ("extrapolate").

        side 10, grid 2 x 3:   0  1  2
                              10 11 12
    """
    rows, columns = grid
    if rows > side or columns > side:
        raise ValueError(f"an image of {rows}x{columns} patches exceeds the {side}x{side} position table: "
                         "lower images.max_size or use a model with a larger table")
    return (np.arange(rows)[:, None] * side + np.arange(columns)).reshape(-1).astype(np.int32)


def interpolated_position_ids(grid: tuple[int, int], side: int) -> np.ndarray:
    """The official alternative ("interpolate"): fractions i/rows and j/columns sorted into `side` equal bins.

    Rounded to float32 as there: in float64 a full grid would not be numbered 0, 1, 2, ... any more.
    """
    bins = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    row, column = (np.searchsorted(bins, (np.arange(n) * (1 / n)).astype(np.float32), side="right") for n in grid)
    return (row[:, None] * side + column).reshape(-1).astype(np.int32)
