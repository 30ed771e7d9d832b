"""What an analysis measures: an opened run and a selection of its examples, in batches."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import multihost_utils

from opsd_jax import sharding
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.examples import Examples
from opsd_jax.evaluation import contexts, inference, wording
from opsd_jax.evaluation import results as results_lib
from opsd_jax.evaluation.wording import Words
from opsd_jax.inputs import cli
from opsd_jax.method_config import RolloutConfig
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import folders
from opsd_jax.run import evaluate, evaluation_request, placement, saves
from opsd_jax.run import session as session_lib
from opsd_jax.run.evaluation_request import Request
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import progress as progress_lib
from opsd_jax.runtime import run_folder
from opsd_jax.runtime.stopping import BeforeBatch, never_stop
from opsd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of a model in one mode, as an evaluation in W/eval has them.

    Attributes:
      name: name of the evaluation.
      summary: content of its summary.json.
      predictions: {task: [prediction]}, lines of its predictions.jsonl, in the order of examples.
    """

    name: str
    summary: dict
    predictions: dict[str, list[dict]]


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """An opened run and the examples that it is diagnosed on. Made by `open_run`.

    Attributes:
      session: the run, with a model without image generation.
      selection: the examples, how they are batched, and the seed of noise.
      request: asks for an evaluation on the same examples.
      command: the command that asks for the diagnosis.
      before_batch: called before each batch, such as `stopping.StopRequest.check`.
    """

    session: session_lib.Session
    selection: contexts.Selection
    request: Request
    command: str = ""
    before_batch: BeforeBatch = never_stop

    @property
    def model(self) -> ModelConfig:
        """Sizes of the network, without image generation."""
        return self.session.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.session.tokenizer

    @property
    def examples(self) -> Examples:
        """Prepared examples of the whole split."""
        return self.selection.examples

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return self.selection.tasks

    @property
    def seed(self) -> int:
        """Seed of noise, sampling and resampling."""
        return self.selection.seed

    @property
    def words(self) -> Words:
        """What pages call the privileged content of the run."""
        return wording.of_blocks(self.selection.packer.names)

    @property
    def total(self) -> int:
        """Number of selected examples of all tasks."""
        return sum(len(self.selection.numbers(source)) for source in range(len(self.tasks)))

    @property
    def is_subset(self) -> bool:
        """Whether some examples of the split are not selected."""
        return self.total < sum(map(len, self.examples.sources))

    def without_trace(self) -> str | None:
        """The pid of the first example that has no text trace; None if all have one."""
        for source in range(len(self.tasks)):
            for n in self.selection.numbers(source):
                example = self.examples.sources[source][n]
                if not example.full_text_only_thought.strip():
                    return example.pid
        return None

    def facts(self) -> dict:
        """What every summary says about the command and the examples."""
        rows = {
            task: {
                "drawn": len(self.selection.numbers(source)),
                "of": len(self.examples.sources[source]),
                "seed": self.selection.subset_seed,
            }
            for source, task in enumerate(self.tasks)
        }
        return {
            "command": self.command,
            "split": self.request.split,
            "seed": self.seed,
            "rows": rows,
        }

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """(number of the task, numbers of the examples that this process packs) of every batch.

        The last batch of a task is filled up with its last example.
        """
        size = self.selection.batch_size
        for source in range(len(self.tasks)):
            numbers = self.selection.numbers(source)
            for start in range(0, len(numbers), size):
                self.before_batch()
                batch = inference.filled(numbers[start : start + size], size)
                yield source, self.selection.local(batch)

    def sampling(self, **changes) -> RolloutConfig:
        """The sampling of the run's evaluation, greedy, with changes by name."""
        return self.session.evaluation_sampling(**changes)

    def progress(self, total: int, name: str) -> progress_lib.Progress:
        """A progress bar that the first process shows."""
        primary = jax.process_index() == 0
        return progress_lib.Progress(total, name, self.request.split, primary=primary)

    def answers(self, checkpoint: str, modes: Sequence[str], name: str = "") -> dict[str, Answers]:
        """Answers of the weights in a step folder: those in W/eval, or new ones, which stay there.

        Args:
          modes: modes of an evaluation.
          name: name of the answers of a step folder of another run; unused for the run's own.

        Returns:
          {mode: answers}.
        """
        is_own = checkpoint_lib.is_of_run(checkpoint, self.session.workdir)
        request = dataclasses.replace(
            self.request,
            visual_thoughts=tuple(modes),
            checkpoint=checkpoint,
            name="" if is_own else name,
        )
        names = evaluate.evaluate(request, self.before_batch)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the first process has written the answers")
        return {
            mode: _read_answers(self.session.workdir, name)
            for mode, name in zip(modes, names, strict=True)
        }


def _read_answers(workdir: str, name: str) -> Answers:
    """The answers of a finished evaluation in W/eval."""
    folder = run_folder.evaluation(workdir, name)
    summary = results_lib.read_summary(os.path.join(folder, run_folder.SUMMARY))
    predictions: dict[str, list[dict]] = {task: [] for task in summary["benchmarks"]}
    for prediction in results_lib.read_predictions(folder):
        predictions[prediction["benchmark"]].append(prediction)
    return Answers(name, summary, predictions)


def open_run(
    workdir: str,
    *,
    split: str = "",
    benchmarks: Sequence[str] = (),
    rows: int = 0,
    batch_size: int = 0,
    seed: int | None = None,
    tensor: int = 0,
) -> Diagnosis:
    """Opens the run (or control arm) in a workdir for its diagnosis.

    Args:
      split: "" for the one that the run evaluates at its end.
      benchmarks: tasks or families of the run; () for all.
      rows: size of a random subset of each task, chosen by config.seed; 0 for all examples.
      batch_size: examples per batch of all processes, rounded up to a multiple of the batch
        shards; 0 for config.eval.batch_size.
      seed: seed of noise, sampling and resampling; None for config.seed.
      tensor: devices that each copy of the model is divided over; 0 for `placement.fastest`.

    Raises:
      FileNotFoundError: no run or no data. ValueError: unknown tasks; a task whose examples have no
        visual thoughts.
    """
    cli.check_number("rows", rows, 0)
    cli.check_number("batch_size", batch_size, 0)
    cli.check_tensor(tensor)
    config = workdir_lib.load_config(workdir)
    tasks = evaluation_request.choose_tasks(benchmarks, config.data.tasks)
    mesh = placement.of_run(config, tensor=tensor, batch_size=batch_size)
    session = session_lib.open_run(workdir, tasks=tasks, mesh=mesh)
    session = dataclasses.replace(
        session, model=dataclasses.replace(session.model, generation=None)
    )
    config = session.config
    split = split or config.eval.final_split or "train"
    shards = sharding.batch_divisor(session.mesh)
    selection = contexts.Selection(
        session.examples(split, asked_by="--split"),
        session.packer,
        session.mesh,
        batch_size=shards,
        limit=rows,
        subset_seed=config.seed,
        seed=config.seed if seed is None else seed,
    )
    most = 0
    for source, task in enumerate(selection.tasks):
        numbers = selection.numbers(source)
        most = max(most, len(numbers))
        if selection.without_visual_thoughts(source) == len(numbers):
            raise ValueError(
                f"none of the {len(numbers)} examples of {task}, {split}, has "
                f"{selection.privileged}: "
                "there is nothing to diagnose; choose another --split or --benchmarks"
            )
    batch_size = -(-batch_size // shards) * shards
    wanted = min(batch_size or config.eval.batch_size, most)
    selection = dataclasses.replace(selection, batch_size=-(-wanted // shards) * shards)
    request = Request(
        workdir,
        benchmarks=tuple(benchmarks),
        split=split,
        rows=rows,
        seed=seed,
        batch_size=batch_size,
        tensor=tensor,
    )
    return Diagnosis(session, selection, request)


def start_checkpoint(workdir: str) -> str:
    """The step folder that a run's OPSD (or else SFT or offline) stage started from.

    Raises:
      ValueError: the run has no such stage, or kept no checkpoint of the weights.
    """
    config = workdir_lib.load_config(workdir)
    compared = ("opsd", "sft", "offline")
    stage = next((stage for stage in compared if stage in config.stages), None)
    if stage is None:
        raise ValueError(
            f"the run in {workdir} has the stages {', '.join(config.stages)}: there is no training "
            "to compare before and after; diagnose one with an opsd, sft or offline stage"
        )
    folder = saves.origin(config, workdir, stage)
    if folders.is_model(folder):
        raise ValueError(
            f"{workdir} has no checkpoint 0: with config.eval.kl=False a run does not save the "
            f"weights that it starts with, here those in {folder}. There is nothing to compare "
            "with; train with config.eval.kl=True for this analysis"
        )
    return folder
