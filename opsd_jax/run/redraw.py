"""A run's data with images that its model generates in place of their visual thoughts."""

import dataclasses
import io
import json
import os

import jax
import numpy as np
from PIL import Image

from opsd_jax import images, interleave
from opsd_jax import params as params_lib
from opsd_jax.data import arrayrecord, prepare, shards
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.inputs import cli, json_files, paths
from opsd_jax.run import model as model_lib
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import files, locks
from opsd_jax.runtime import progress as progress_lib

SHARD = 512  # rows of a parquet file; what a kill can cost


def redraw(
    workdir: str,
    target: str,
    *,
    checkpoint: str = "",
    splits=("train",),
    batch_size: int = 64,
    seed: int = 0,
    before_batch=lambda: None,
):
    """Writes DIR/drawn/parquet/<task>/data/<split>-*.parquet, then prepares DIR from them (`visual_opsd.prepare`).

    Interrupted, it goes on after the last whole file. Rows of every split that the run uses are written.

    Args:
      workdir: of the run, or of an arm. checkpoint: a step folder whose model draws; "" for the newest.
      splits: those whose visual thoughts are drawn. before_batch: called before each batch, such as
        `stopping.StopRequest.check`.
    Raises:
      FileNotFoundError: no run, data or checkpoint. FileExistsError: DIR holds other pictures. ValueError: the model
      cannot draw; unknown splits. locks.FolderInUseError: another command is writing into DIR.
    """

    cli.check_precision()
    paths.check_given("--workdir", workdir, orbax=True)
    paths.check("--checkpoint", checkpoint)
    paths.check_given("--target", target)
    cli.check_once("splits", splits)
    cli.check_number("batch_size", batch_size, 1)
    cli.check_seed(seed)
    config = workdir_lib.load_config(workdir)
    used = list(
        dict.fromkeys(s for s in ("train", config.eval.split, config.eval.final_split) if s)
    )
    if unknown := set(splits) - set(used):
        raise ValueError(
            f"--splits={','.join(splits)}: the run uses {', '.join(used)}, not {', '.join(sorted(unknown))}"
        )
    folder, number = os.path.join(target, "drawn"), 0
    record_path = os.path.join(folder, "redraw.json")

    def load():
        step = checkpoint or checkpoint_lib.newest(workdir)
        model = model_lib.load(step, generation=True)
        record = {
            "checkpoint": os.path.realpath(step),
            "weights": params_lib.fingerprint(model.params),
            "rows": digests,
            "splits": list(splits),
            "batch_size": batch_size,
            "seed": seed,
        }
        _check_claim(record_path, record)
        return model, record

    with locks.only_writer(target):
        place = workdir_lib.data_dir(config, workdir_lib.data_workdir(config, workdir))
        digests = shards.digests(place, config.data.tasks)
        model, record = checkpoint_lib.retry_if_gone(load, given=checkpoint)
        files.write(record_path, json.dumps(record), primary=jax.process_index() == 0)
        for task in config.data.tasks:
            for split in used:
                source = arrayrecord.open_source(place, split, task=task)
                count = -(-len(source) // SHARD)
                doing = "drawing" if split in splits else "copying"
                with progress_lib.Progress(len(source), f"{doing} {task}", split) as progress:
                    for shard in range(count):
                        path = os.path.join(
                            folder,
                            "parquet",
                            task,
                            "data",
                            f"{split}-{shard:05d}-of-{count:05d}.parquet",
                        )
                        rows = [
                            source[n]
                            for n in range(shard * SHARD, min((shard + 1) * SHARD, len(source)))
                        ]
                        if not os.path.exists(path):
                            if split in splits:
                                key = jax.random.fold_in(jax.random.key(seed), number)
                                rows = _draw(model, config, rows, key, batch_size, before_batch)
                            _write(path, rows)
                        number += 1
                        progress.update(shard * SHARD + len(rows))
        return prepare.prepare(os.path.join(folder, "parquet"), target)


def _check_claim(path, record) -> None:
    """FileExistsError where the record of other images is stored."""
    if os.path.exists(path):
        there = json_files.read(path, fix=f"delete {os.path.dirname(path)}, and all is drawn again")
        # the weights count, not their path: another model may be stored there by now
        if changed := [
            key
            for key in {**there, **record}
            if there.get(key) != record.get(key) and key != "checkpoint"
        ]:
            now, was = ({key: x.get(key) for key in changed} for x in (record, there))
            raise FileExistsError(
                f"{path} says that images there were generated with other {', '.join(changed)}, {was}, not "
                f"{now}: choose another --target, or delete it"
            )


def _draw(model, config, rows, key, batch_size, before_batch) -> list:
    """The examples with drawn pictures, as PNG."""
    found, size = [], min(batch_size, len(rows))
    for start in range(0, len(rows), size):
        before_batch()
        part = rows[start : start + size]
        rounds = 1 + max(len(row.visual_thoughts) for row in part)
        asked = dataclasses.replace(
            model, protocol=dataclasses.replace(model.protocol, rounds=rounds)
        )
        questions = [
            (
                [images.open_rgb(row.problem_image, transparency=config.images.transparency)],
                row.question + config.prompts.suffix,
            )
            for row in [*part, *[part[-1]] * (size - len(part))]
        ]
        traces = interleave.reason(
            asked, questions, jax.random.fold_in(key, start), generation=True, always=True
        )
        found += [
            dataclasses.replace(
                row, visual_thoughts=tuple(map(_png, trace.images[: len(row.visual_thoughts)]))
            )
            for row, trace in zip(part, traces)
        ]
    return found


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path, rows) -> None:
    """Examples as a parquet file in the released columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image, text = pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string()
    thoughts, drawn = (
        max(len(of(row)) for row in rows)
        for of in (lambda r: r.thoughts, lambda r: r.visual_thoughts)
    )
    schema = {
        "pid": text,
        "question": text,
        "answer": text,
        "task": text,
        "full_text_only_thought": text,
        "metadata": text,
        "problem_image_0": image,
        **{f"resoning_thought_{n}": text for n in range(thoughts)},
        **{f"reasoning_image_{n}": image for n in range(drawn)},
    }
    at = lambda values, n: values[n] if n < len(values) else None
    picture = lambda value, name: value and {"bytes": value, "path": name}
    records = [
        {
            "pid": row.pid,
            "question": row.question,
            "answer": row.answer,
            "task": row.task,
            "full_text_only_thought": row.full_text_only_thought,
            "metadata": json.dumps(row.metadata),
            "problem_image_0": picture(row.problem_image, f"{row.pid}.png"),
            **{f"resoning_thought_{n}": at(row.thoughts, n) for n in range(thoughts)},
            **{
                f"reasoning_image_{n}": picture(at(row.visual_thoughts, n), f"{row.pid}_{n}.png")
                for n in range(drawn)
            },
        }
        for row in rows
    ]
    with files.replacing(path) as f:
        pq.write_table(
            pa.Table.from_pylist(records, schema=pa.schema(schema)), f, row_group_size=256
        )
