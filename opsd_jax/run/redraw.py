"""A run's data with images that its model generates in place of their visual thoughts."""

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from opsd_jax import interleave, sharding
from opsd_jax import params as params_lib
from opsd_jax.data import arrayrecord, prepare
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.schema import Example
from opsd_jax.inputs import cli, json_files, paths
from opsd_jax.inputs import columns as columns_lib
from opsd_jax.interleave import Reasoner
from opsd_jax.release import folders
from opsd_jax.run import model as model_lib
from opsd_jax.run import session
from opsd_jax.run.session import Session
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import files, locks
from opsd_jax.runtime.progress import Progress
from opsd_jax.runtime.stopping import BeforeBatch, never_stop

SHARD = 512  # examples per parquet file, and what a kill can cost


@dataclasses.dataclass(frozen=True)
class Batches:
    """How a model is asked for images.

    Attributes:
      size: examples per batch, rounded up to a multiple of the copies of the model.
      tensor: devices that each copy is divided over; 0 for `placement.fastest`.
      seed: seed of sampling and noise.
    """

    size: int = 64
    tensor: int = 0
    seed: int = 0


def redraw(
    workdir: str,
    target: str,
    *,
    checkpoint: str = "",
    splits: Sequence[str] = ("train",),
    batches: Batches = Batches(),
    before_batch: BeforeBatch = never_stop,
):
    """Writes DIR/drawn/parquet/<task>/data/<split>-*.parquet, then prepares DIR from them.

    Examples of every split that the run uses are written. If it is interrupted, the next call
    continues after the last whole file.

    Args:
      workdir: folder of the run, or of a control arm.
      target: DIR, the TFDS data_dir to write.
      checkpoint: a step folder whose model generates the images, or one of which the newest step is
        taken, see `checkpoint.step_folder`, or a released or imported model; "" for the run's
        newest.
      splits: those whose visual thoughts are generated. The others are copied.
      batches: how the model is asked.
      before_batch: called before each batch, such as `StopRequest.check`.
    Returns:
      What `prepare.prepare` returns.
    Raises:
      FileNotFoundError: no run, data or checkpoint. FileExistsError: DIR holds other images.
      ValueError: the model cannot generate images; unknown splits.
      FolderInUseError: another command is writing into DIR.
    """
    cli.check_precision()
    paths.check_given("--workdir", workdir, orbax=True)
    paths.check("--checkpoint", checkpoint)
    paths.check_given("--target", target)
    cli.check_once("splits", splits)
    cli.check_number("batch_size", batches.size, 1)
    cli.check_tensor(batches.tensor)
    cli.check_seed(batches.seed)
    used = _splits(workdir_lib.load_config(workdir))
    if unknown := set(splits) - set(used):
        raise ValueError(
            f"--splits={','.join(splits)}: the run uses {', '.join(used)}, not "
            f"{', '.join(sorted(unknown))}"
        )
    folder = os.path.join(target, "drawn")
    record_path = os.path.join(folder, "redraw.json")

    def load() -> tuple[Reasoner, dict]:
        step = checkpoint
        if not (checkpoint and folders.is_model(checkpoint)):
            step = checkpoint_lib.step_folder("--checkpoint", checkpoint, workdir)
        model = model_lib.load(
            step, generation=True, batch_size=batches.size, tensor=batches.tensor
        )
        record = {
            "checkpoint": os.path.realpath(step),
            "weights": params_lib.fingerprint(model.params),
            "rows": run.digests["data"],
            "splits": list(splits),
            "batch_size": batches.size,
            "seed": batches.seed,
        }
        _check_claim(record_path, record)
        return model, record

    with locks.only_writer(target):
        run = session.open_run(workdir)
        model, record = checkpoint_lib.retry_if_gone(load, given=checkpoint)
        files.write(record_path, json.dumps(record), primary=jax.process_index() == 0)
        columns = tuple(run.config.data.columns)  # others are not read by the run
        for number, shard in enumerate(_shards(run, used, splits, folder)):
            if os.path.exists(shard.path):
                continue
            examples = shard.read()
            if shard.split in splits:
                key = jax.random.fold_in(jax.random.key(batches.seed), number)
                examples = _generate(run, model, examples, key, batches.size, before_batch)
            _write(shard.path, examples, columns)
        part = prepare.Part(columns=columns)
        return prepare.prepare(os.path.join(folder, "parquet"), target, part)


def _splits(config: ConfigDict) -> list[str]:
    """The splits that a run uses, each once."""
    splits = ("train", config.eval.split, config.eval.final_split)
    return list(dict.fromkeys(filter(None, splits)))


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A parquet file to write: some examples of a split of a task.

    Attributes:
      path: the file.
      split: the split.
      source: all examples of it.
      numbers: those of the file.
    """

    path: str
    split: str
    source: arrayrecord.Source
    numbers: range

    def read(self) -> list[Example]:
        return [self.source[n] for n in self.numbers]


def _shards(
    run: Session, used: Sequence[str], generated: Sequence[str], folder: str
) -> Iterator[_Shard]:
    """The files of all tasks and splits, with a progress bar for each split of a task."""
    for task in run.config.data.tasks:
        for split in used:
            doing = "generating" if split in generated else "copying"
            source = arrayrecord.open_source(run.data_dir, split, task=task, asked_by="--splits")
            count = -(-len(source) // SHARD)
            with Progress(len(source), f"{doing} {task}", split) as progress:
                for n in range(count):
                    name = f"{split}-{n:05d}-of-{count:05d}.parquet"
                    numbers = range(n * SHARD, min((n + 1) * SHARD, len(source)))
                    path = os.path.join(folder, "parquet", task, "data", name)
                    yield _Shard(path, split, source, numbers)
                    progress.update(numbers.stop)


def _check_claim(path: str, record: dict) -> None:
    """FileExistsError where the folder holds images that were generated otherwise.

    The weights count, not their path: another model may be stored there by now.
    """
    if os.path.exists(path):
        fix = f"delete {os.path.dirname(path)}, and all images are generated again"
        saved = json_files.read(path, fix=fix)
        if changed := [
            key
            for key in {**saved, **record}
            if saved.get(key) != record.get(key) and key != "checkpoint"
        ]:
            now, was = ({key: x.get(key) for key in changed} for x in (record, saved))
            raise FileExistsError(
                f"{path} says that its images were generated with other {', '.join(changed)}, "
                f"{was}, not {now}: choose another --target, or delete it"
            )


def _generate(
    run: Session,
    model: Reasoner,
    examples: list[Example],
    key: jax.Array,
    batch_size: int,
    before_batch: BeforeBatch,
) -> list[Example]:
    """The examples with as many generated images as each has visual thoughts, as PNG.

    The last example of the last batch repeats until the batch is full.
    """
    found: list[Example] = []
    ask = run.preprocessor().question
    assert model.mesh is not None  # batches were announced
    copies = sharding.batch_divisor(model.mesh)
    size = -(-min(batch_size, len(examples)) // copies) * copies
    for start in range(0, len(examples), size):
        before_batch()
        part = examples[start : start + size]
        rounds = 1 + max(len(example.visual_thoughts) for example in part)
        protocol = dataclasses.replace(model.protocol, rounds=rounds)
        questions = [ask(example) for example in part]
        answers = interleave.reason(
            dataclasses.replace(model, protocol=protocol),
            questions + questions[-1:] * (size - len(part)),
            jax.random.fold_in(key, start),
            interleave.ImageGeneration(always=True),
        )
        for example, answer in zip(part, answers):
            generated = answer.images[: len(example.visual_thoughts)]
            found.append(dataclasses.replace(example, visual_thoughts=tuple(map(_png, generated))))
    return found


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: str, examples: list[Example], columns: Sequence[str]) -> None:
    """Writes examples as a parquet file with the released columns and further ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image, text = pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string()
    problems = range(max(len(example.problem_images) for example in examples))
    thoughts = range(max(len(example.thoughts) for example in examples))
    visual = range(max(len(example.visual_thoughts) for example in examples))
    names = ("pid", "question", "answer", "task", "full_text_only_thought", "metadata")
    schema = {
        **dict.fromkeys(names, text),
        **{f"problem_image_{n}": image for n in problems},
        **{f"resoning_thought_{n}": text for n in thoughts},
        **{f"reasoning_image_{n}": image for n in visual},
        **{
            columns_lib.of_files(name): text
            if name.startswith(columns_lib.TEXT)
            else pa.list_(image)
            for name in columns
        },
    }
    records = [
        {
            "pid": example.pid,
            "question": example.question,
            "answer": example.answer,
            "task": example.task,
            "full_text_only_thought": example.full_text_only_thought,
            "metadata": json.dumps(example.metadata),
            **{
                f"problem_image_{n}": _stored(
                    _at(example.problem_images, n), _problem_file(example.pid, n)
                )
                for n in problems
            },
            **{f"resoning_thought_{n}": _at(example.thoughts, n) for n in thoughts},
            **{
                f"reasoning_image_{n}": _stored(
                    _at(example.visual_thoughts, n), f"{example.pid}_{n}.png"
                )
                for n in visual
            },
            **{columns_lib.of_files(name): _column(example, name) for name in columns},
        }
        for example in examples
    ]
    table = pa.Table.from_pylist(records, schema=pa.schema(schema))
    with files.replacing(path) as f:
        pq.write_table(table, f, row_group_size=256)


def _column(example: Example, name: str) -> str | list[dict | None]:
    """The value of a further column as a parquet file stores it."""
    value, column = example.column(name), columns_lib.of_files(name)
    if isinstance(value, str):
        return value
    return [_stored(data, f"{example.pid}_{column}_{n}") for n, data in enumerate(value)]


def _problem_file(pid: str, number: int) -> str:
    """The path that a parquet file names for a problem image; for the first as in the release."""
    return f"{pid}_problem_{number}.png" if number else f"{pid}.png"


def _at(values: Sequence, n: int):
    """Value n; None beyond the end."""
    return values[n] if n < len(values) else None


def _stored(image: bytes | None, name: str) -> dict | None:
    """An image as the released files store it."""
    return {"bytes": image, "path": name} if image else None
