"""The run that is diagnosed: its rows, weights and batches; and the files that an analysis leaves."""

import dataclasses
import json
import os
from collections.abc import Callable

import jax
import numpy as np

from opsd_jax import config as config_lib
from opsd_jax import images, rollout, sharding, tokenizer
from opsd_jax.data import examples, packing
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import contexts, html, inference
from opsd_jax.inputs import cli
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.run import request
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import files
from opsd_jax.runtime import progress as progress_lib

ROWS = 128  # of each task, chosen at random, if the command does not say


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is diagnosed, and the rows it is diagnosed on. Made by `open_run`.

    model: ModelConfig without image generation. limit: the size of a random subset of each task (`randomness.subset`, by
    config.seed), 0 for all. batch_size: of all processes.
    before_batch: called before each batch, such as `stopping.StopRequest.check`.
    """

    workdir: str
    config: object
    model: ModelConfig
    mesh: object
    tokenizer: object
    marker: object
    rows: object
    packer: object
    tasks: tuple
    split: str
    limit: int
    batch_size: int
    seed: int
    before_batch: Callable = lambda: None

    @property
    def selection(self) -> contexts.Selection:
        """The rows that are looked at, as evaluation takes them."""
        return contexts.Selection(
            self.rows,
            self.packer,
            self.mesh,
            self.batch_size,
            self.limit,
            self.config.seed,
            self.seed,
        )

    def numbers(self, source: int) -> list[int]:
        """Rows of a task that are looked at."""
        return self.selection.numbers(source)

    @property
    def total(self) -> int:
        return sum(len(self.numbers(source)) for source in range(len(self.tasks)))

    @property
    def is_subset(self) -> bool:
        return self.total < sum(map(len, self.rows.sources))

    def without_trace(self) -> str | None:
        """The pid of the first row that has no text trace; None if all have one."""
        rows = (
            self.rows.sources[source][n]
            for source in range(len(self.tasks))
            for n in self.numbers(source)
        )
        return next((row.pid for row in rows if not row.full_text_only_thought.strip()), None)

    def facts(self) -> dict:
        """What every summary says."""
        rows = {
            task: {
                "drawn": len(self.numbers(source)),
                "of": len(self.rows.sources[source]),
                "seed": self.config.seed,
            }
            for source, task in enumerate(self.tasks)
        }
        return {"split": self.split, "seed": self.seed, "rows": rows}


def open_run(
    workdir: str,
    *,
    split: str = "",
    benchmarks=(),
    limit: int = ROWS,
    batch_size: int = 0,
    seed: int | None = None,
    before_batch=lambda: None,
) -> Run:
    """Opens the run (or arm) in a workdir for its diagnosis.

    split: "" for the one that the run evaluates at its end. batch_size: 0 for the run's config.eval.batch_size; made
    a multiple of what the devices share.
    Raises FileNotFoundError: no run or data. ValueError: unknown tasks, no visual thoughts in the rows.
    """
    cli.check_number("rows", limit, 0)
    cli.check_number("batch_size", batch_size, 0)
    config = workdir_lib.load_config(workdir)
    where, chosen = (
        workdir_lib.data_workdir(config, workdir),
        request.choose_tasks(benchmarks, config.data.tasks),
    )
    config = workdir_lib.with_tasks(config, chosen)
    split = split or config.eval.final_split or "train"
    tok = tokenizer.load(
        workdir_lib.tokenizer_folder(config, where), vocab_size=config.model.llm.vocab_size
    )
    mesh = sharding.make_mesh(tensor=config.mesh.tensor)
    unit = sharding.batch_divisor(mesh)
    marker = rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size)
    run = Run(
        workdir,
        config,
        dataclasses.replace(config_lib.model(config), generation=None),
        mesh,
        tok,
        marker,
        examples.Examples.open(config, where, tok, split),
        packing.Packer.from_config(config, tok),
        chosen,
        split,
        limit,
        unit,
        config.seed if seed is None else seed,
        before_batch,
    )
    for source, task in enumerate(chosen):
        numbers = run.numbers(source)
        if not any(run.rows.sources[source][n].visual_thoughts for n in numbers):
            raise ValueError(
                f"none of the {len(numbers)} rows of {task}, {split}, has visual thoughts: there is nothing to "
                "diagnose; choose another --split or --benchmarks"
            )
    wanted = min(
        batch_size or config.eval.batch_size, max(len(run.numbers(s)) for s in range(len(chosen)))
    )
    return dataclasses.replace(run, batch_size=-(-wanted // unit) * unit)


def start(workdir: str) -> str:
    """The checkpoint that a run's OPSD (or else SFT) stage started from."""
    config = workdir_lib.load_config(workdir)
    ends = config_lib.stage_ends(config)
    stage = next((stage for stage in ("opsd", "sft", "offline") if stage in ends), None)
    if stage is None:
        raise ValueError(
            f"the run in {workdir} has the stages {', '.join(config.stages)}: there is no training to "
            "compare before and after; diagnose one with an opsd, sft or offline stage"
        )
    return os.path.join(workdir, "checkpoints", str(ends[stage] - config[stage].steps))


def load(run: Run, checkpoint: str):
    """The weights in a checkpoint, laid out for scoring."""
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=run.model))
    return checkpoint_lib.restore_params(
        checkpoint, sharding.abstract(run.mesh, abstract), partial=run.config.model.generation.on
    )


def for_sampling(run, params):
    """The weights laid out as the sampler wants them."""
    return rollout.relayout_program(run.mesh, params, run.config.model.dtype)(params)


def sampling(run, **changes):
    """RolloutConfig of the run's evaluation."""
    c = run.config
    return config_lib.rollout(
        c,
        run.tokenizer,
        run.marker,
        slots=c.eval.slots,
        refill=0,
        shards=sharding.batch_divisor(run.mesh),
        max_new_tokens=c.eval.max_new_tokens or c.rollout.max_new_tokens,
        **changes,
    )


def batches(run):
    """(source, numbers of the rows that this process packs) of every batch."""
    mine = sharding.local_batch_indices(run.mesh, run.batch_size)
    for source in range(len(run.tasks)):
        numbers = run.numbers(source)
        for start in range(0, len(numbers), run.batch_size):
            run.before_batch()
            part = inference.filled(numbers[start : start + run.batch_size], run.batch_size)
            yield source, [part[n] for n in mine]


def put(run, tree):
    """This process's rows of a batch -> arrays on the run's mesh."""
    return sharding.put_batch(run.mesh, tree)


def progress(run, total, name):
    """A progress bar over `total` rows, shown by the first process."""
    return progress_lib.Progress(total, name, run.split, primary=jax.process_index() == 0)


def answers(run: Run, params, modes, name: str) -> dict:
    """Greedy answers in each of the modes: {mode: {task: [prediction]}}, predictions as in `eval.Result`."""
    params, found = for_sampling(run, params), {}
    with progress(run, run.total * len(modes), name) as shown:
        for k, mode in enumerate(modes):
            results = contexts.evaluate(
                params,
                run.selection,
                mode,
                sampling=sampling(run, greedy=True),
                before_batch=run.before_batch,
                on_batch=lambda done, k=k, mode=mode: shown.update(
                    k * run.total + done.done, mode=mode, **done.shown
                ),
            )
            found[mode] = {r.name: r.predictions for r in results}
    return found


def rows_text(summary: dict) -> str:
    """Which rows a summary is of: "test, 128 of 512 rows chosen at random with seed 0"."""
    parts = [
        f"{'' if len(summary['rows']) == 1 else task + ': '}"
        + (
            f"{r['drawn']} of {r['of']} rows chosen at random with seed {r['seed']}"
            if r["drawn"] < r["of"]
            else f"all {r['of']} rows"
        )
        for task, r in summary["rows"].items()
    ]
    return f"{summary['split']}, {'; '.join(parts)}"


def pictures(run, row) -> list[str]:
    """HTML of a prepared row's problem image and visual thoughts."""
    patch = run.config.model.vit.patch_size
    shown = [
        ("problem", row.problem),
        *((f"visual thought {n}", vt) for n, vt in enumerate(row.visual_thoughts)),
    ]
    return [
        html.image(images.unpatchify(image.patches, image.grid, patch), size=160, caption=caption)
        for caption, image in shown
    ]


def finish(folder, summary, page) -> tuple[str, list[str]]:
    """Writes report.html and, last of all, summary.json, by the first process for all; the parts of the page."""
    if jax.process_index():
        return "", []
    title, parts = page(summary)
    files.write(
        os.path.join(folder, "report.html"),
        html.page(title, *parts),
        primary=jax.process_index() == 0,
    )
    files.write(
        os.path.join(folder, "summary.json"),
        json.dumps(summary, indent=1, allow_nan=False) + "\n",
        primary=jax.process_index() == 0,
    )
    return title, parts


def write_arrays(path, arrays) -> None:
    """Writes arrays by name as .npz, whole or not at all, by the first process for all."""
    if jax.process_index() == 0:
        with files.replacing(path) as f:
            np.savez_compressed(f, allow_pickle=False, **arrays)
