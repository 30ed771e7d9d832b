"""Questions asked by a protocol, with image generation or without.

  none               text alone
  generated          the model generates images where its text asks for them, as ThinkMorph does,
                     and sees them
  generated-noise    it sees Gaussian noise instead
  generated-swap     it sees what another example generated in that round
  generated-remove   it sees nothing

Generated images are kept in <folder>/pictures/<benchmark>/<key>-<number>.png.
"""

import dataclasses
import functools
import itertools
import os

import jax
import numpy as np
from PIL import Image

from opsd_jax import images, interleave
from opsd_jax.data.randomness import generator
from opsd_jax.evaluation import answer_files, inference
from opsd_jax.evaluation.benchmark import Benchmark, Key
from opsd_jax.interleave import Intervention


@dataclasses.dataclass(frozen=True, eq=False)
class InterleavedPredictor:
    """Answers a batch of questions by rounds of text and images (`interleave.reason`).

    Attributes:
      reasoner: the model.
      mode: "none", "generated", or "generated-noise", "-swap", "-remove".
      batch_size: questions per batch; a shorter batch is filled up with its last question.
      seed: seed of sampling, of image generation, and of the noise shown instead of images.
      folder: folder of the results, where generated images are written.
      swap_from: for swaps, the folder of a finished "generated" evaluation.
      in_rounds: whether texts are kept in the form of the public harness, "Round_0:" and so on.
    """

    reasoner: interleave.Reasoner
    mode: str
    batch_size: int
    seed: int
    folder: str
    swap_from: str = ""
    in_rounds: bool = False

    def __call__(self, number: int, benchmark: Benchmark, keys: list[Key]) -> dict:
        questions = [benchmark.question(key) for key in keys]
        generation = None
        if self.mode != "none":
            generation = interleave.ImageGeneration(
                intervention=self.intervention(benchmark.name, keys)
            )
        ask = functools.partial(
            interleave.reason,
            self.reasoner,
            inference.filled(questions, self.batch_size),
            jax.random.fold_in(jax.random.key(self.seed), number),
            generation,
        )
        answers, seconds, compiled = inference.timed(ask)

        def skips(answer):  # an answer by a protocol, or with generated images, has none
            is_skipped = generation is None and self.reasoner.protocol.max_image_skips > 0
            return {"image_skips": answer.image_skips} if is_skipped else {}

        predictions = []
        for key, answer in zip(keys, answers):  # without those that fill the batch up
            for n, image in enumerate(answer.images):
                answer_files.save_image(image, image_path(self.folder, benchmark.name, key, n))
            predictions.append(
                {
                    "index": key,
                    "prediction": answer_files.as_harness(answer)
                    if self.in_rounds
                    else answer.text,
                    "expected": benchmark.expected(key),
                    "tokens": answer.tokens,
                    "pictures": len(answer.images),
                    **skips(answer),
                }
            )
        return {"predictions": predictions, "seconds": seconds, "compiled": compiled}

    def intervention(self, name: str, keys: list[Key]) -> Intervention | None:
        """What the mode does to the images generated for a batch of keys (`intervention`)."""
        return intervention(self.mode, name, keys, seed=self.seed, swap_from=self.swap_from)


def image_path(folder: str, name: str, key: Key, number: int) -> str:
    """Path of the `number`-th image that was generated for a key of the benchmark `name`."""
    return os.path.join(folder, "pictures", name, f"{_file_stem(key)}-{number}.png")


def generated_images(folder: str, name: str, key: Key) -> list[Image.Image]:
    """The images that were generated for a key, in order."""
    paths = (image_path(folder, name, key, n) for n in itertools.count())
    return [images.open_rgb(path) for path in itertools.takewhile(os.path.exists, paths)]


def _file_stem(key: Key) -> str:
    """A key in file names.

    The key of a table may be any text, such as "../x"; no file is written elsewhere.
    """
    return str(key).replace("/", "%2F")


def noise_image(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise uint8 [H, W, 3] of an image's size.

    Standard normal values, clipped to [-1, 1], the range of the autoencoder's pixels.
    """
    values = np.clip(rng.standard_normal(image.shape, np.float32), -1, 1)
    return np.round((values + 1) * 127.5).astype(np.uint8)


def intervention(
    mode: str, name: str, keys: list[Key], *, seed: int, swap_from: str = ""
) -> Intervention | None:
    """What a mode does to generated images of a batch: see `interleave.Intervention`.

    None for modes that change nothing.

    Args:
      name: name of the benchmark. keys: keys of the batch, without those that fill it up.
      swap_from: for swaps, the folder of a finished "generated" evaluation. An example gets what
        the next one there (by name) generated in that round; the last example gets what the first
        one generated.
    Raises:
      FileNotFoundError: swaps of an evaluation that generated no image, or none in that round.
    """
    if mode in ("none", "generated"):
        return None
    kind = mode.removeprefix("generated-")
    if kind == "remove":
        return lambda b, number, image: None
    if kind == "noise":

        def noise(b, number, image):
            b = min(b, len(keys) - 1)
            # These words are part of the seed: others would give other noise than earlier results.
            words = f"noise for a drawn picture, {name} {keys[b]}"
            return noise_image(image, generator(seed, words, number))

        return noise
    others = _image_counts(swap_from, name)

    def swap(b, number, image):
        own = _file_stem(keys[min(b, len(keys) - 1)])
        there = sorted(key for key, count in others.items() if number < count and key != own)
        if not there:
            raise FileNotFoundError(
                f"no other example of {name} has an image of round {number + 1} in "
                f"{swap_from}/pictures/{name}: a swap needs two examples that generate one"
            )
        chosen = next((key for key in there if key > own), there[0])
        return np.asarray(images.open_rgb(image_path(swap_from, name, chosen, number)))

    return swap


def _image_counts(folder: str, name: str) -> dict[str, int]:
    """{key as in file names: number of images} of a finished evaluation."""
    place = os.path.join(folder, "pictures", name)
    if not folder or not os.path.isdir(place):
        raise FileNotFoundError(
            f"{place} holds no generated images: swaps show an example what another one "
            "generated. Evaluate --visual_thoughts=generated of the same checkpoint and examples "
            "first, or in the same command"
        )
    found = {}
    for file in os.listdir(place):
        stem, _, ending = file.rpartition(".")
        key, _, number = stem.rpartition("-")
        if ending == "png":
            found[key] = max(found.get(key, 0), int(number) + 1)
    return found
