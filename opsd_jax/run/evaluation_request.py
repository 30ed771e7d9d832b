"""What an evaluation is asked to do, checked before anything slow, and the names of its results."""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Sequence

from ml_collections import ConfigDict

from opsd_jax import config_check
from opsd_jax import tasks as task_families
from opsd_jax.data import arrayrecord
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import store, tables
from opsd_jax.evaluation.contexts import CONTEXTS, GENERATED, MODES
from opsd_jax.inputs import checks, cli, paths
from opsd_jax.release import folders
from opsd_jax.run import model
from opsd_jax.runtime import checkpoint as checkpoint_lib
from opsd_jax.runtime import run_folder

RELEASE_BATCH_SIZE = 16  # questions per batch of a model that is not a run


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for; the flags of `python -m opsd_jax.eval`.

    Attributes:
      workdir: folder of the run, or of an arm; with a released model in `checkpoint`, a folder
        for results.
      visual_thoughts: the modes, what the model sees, see `opsd_jax.eval`.
      checkpoint: a step folder, or one of which the newest step is taken, see
        `checkpoint.step_folder`; "" for the newest one of the run; or a released or imported model.
      benchmarks: tasks or families of the run, and public tables; () for all that there are.
      data_dir: folder of the public tables.
      protocol: a name in `interleave.PROTOCOLS`; "" for the run's own contexts, greedy.
      split: split of the tasks.
      rows: size of a random subset of each benchmark (of whole questions where a table asks each
        several times); 0 for all. The subset depends on config.seed (0 for a model that is not a
        run), so that results of several seeds stay paired.
      ban_marker: never sample what completes <image_start>.
      samples: answers that are sampled for each example of the run's tasks, for pass@k; 0 for one
        greedy answer.
      temperature: of these samples; None for config.rollout.temperature.
      seed: seed of noise and sampling; None for the run's.
      name: name of the results. "" makes one that says what was measured, so that a rerun replaces
        equals by equals: <step>-<mode>, then banned and the protocol if given, and more where
        split, rows, tasks or seed are not the run's own.
      batch_size: 0 for config.eval.batch_size (16 for a model that is not a run).
      on_bad_row: "fail", or "skip": rows of a table that cannot be shown are listed in the summary
        and left out.
      against: results to compare with in the report: a name in W/eval, or a folder.
      tensor: devices that each copy of the model is divided over; 0 for `placement.fastest`.
      dtype: compute dtype, "float32" or "bfloat16"; "" for the model's own.
      compute_every: of generated images, see `FlowConfig`; 0 for the run's own.
    """

    workdir: str
    visual_thoughts: tuple[str, ...] = ("none",)
    checkpoint: str = ""
    benchmarks: tuple[str, ...] = ()
    data_dir: str = ""
    protocol: str = ""
    split: str = "test"
    rows: int = 0
    ban_marker: bool = False
    samples: int = 0
    temperature: float | None = None
    seed: int | None = None
    name: str = ""
    batch_size: int = 0
    on_bad_row: str = "fail"
    against: str = ""
    tensor: int = 0
    dtype: str = ""
    compute_every: int = 0

    @property
    def command(self) -> str:
        """The command that asks for the same."""
        flags = ["python", "-m", "opsd_jax.eval"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            flags.append(f"--{field.name}" + ("" if value is True else f"={text}"))
        return shlex.join(flags)


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that was checked: what its modes share. Made by `check`.

    Attributes:
      request: what was asked for.
      config: settings of the run; None for a model that is not a run.
      checkpoint: a step folder, or a released or imported model.
      step: step of the checkpoint; None for a model that is not a run.
      tasks: tasks of the run.
      tables: public tables.
      names: {mode: name of the results}.
      seed: seed of noise and sampling.
      subset_seed: chooses random subsets; the same for every `seed`.
      batch_size: examples per batch.
      is_other_dtype: whether the request names another compute dtype than the model's own.
    """

    request: Request
    config: ConfigDict | None
    checkpoint: str
    step: int | None
    tasks: tuple[str, ...]
    tables: tuple[tables.Table, ...]
    names: dict[str, str]
    seed: int
    subset_seed: int
    batch_size: int
    is_other_dtype: bool = False

    def folder(self, mode: str) -> str:
        """Folder of the results of a mode."""
        return run_folder.evaluation(self.request.workdir, self.names[mode])

    def in_contexts(self, mode: str) -> bool:
        """Whether examples are packed as in training, instead of being asked by a protocol."""
        by_protocol = self.request.protocol or self.tables
        return not by_protocol and mode not in GENERATED

    def label(self, mode: str) -> str:
        """The mode in names of results and protocols: "none-banned"."""
        return f"{mode}-banned" if self.request.ban_marker else mode

    @property
    def about(self) -> dict:
        """What every summary says of the request."""
        return {
            "checkpoint": self.checkpoint,
            "seed": self.seed,
            "split": self.request.split if self.tasks else None,
            "step": self.step,
            "asked_by": self.request.protocol or "run",
            **self.sampled,
        }

    @property
    def sampled(self) -> dict:
        """How many answers are sampled, and how; {} for greedy answers."""
        if not self.request.samples:
            return {}
        assert self.config is not None  # only the tasks of a run are sampled
        own, given = self.config.rollout.temperature, self.request.temperature
        temperature = own if given is None else given
        return {"samples": self.request.samples, "temperature": temperature}


def check(request: Request, config: ConfigDict | None = None) -> Job:
    """Checks a request.

    Args:
      config: settings of the run; None reads W/config.json.
    Raises:
      FileNotFoundError: no run, data or checkpoint. FileExistsError: the name is taken.
      ValueError: unknown modes, benchmarks or split, arguments that do not go together, or a
        checkpoint of another run without a name.
    """
    _check_arguments(request)
    released = bool(request.checkpoint) and folders.is_model(request.checkpoint)
    if released:
        config = None
    elif config is None:
        config = workdir_lib.load_config(request.workdir)
    files, tasks = _choose_benchmarks(request, config)
    _check_modes(request, public=bool(files))
    if config is not None and "image" in request.visual_thoughts:
        config_check.check_control(config, "--visual_thoughts", "image", "remove")
    checkpoint, step, stem = request.checkpoint, None, ""
    if released:
        stem = os.path.basename(os.path.abspath(checkpoint))
    else:
        checkpoint, step = _choose_checkpoint(request)
    found = tuple(tables.read(path) for path in files.values())
    own_seed = config.seed if config else 0
    own_size = config.eval.batch_size if config else RELEASE_BATCH_SIZE
    job = Job(
        request=request,
        config=config,
        checkpoint=checkpoint,
        step=step,
        tasks=tasks,
        tables=found,
        names={},
        seed=own_seed if request.seed is None else request.seed,
        subset_seed=own_seed,
        batch_size=request.batch_size or own_size,
    )
    if request.dtype:
        own = config.model.dtype if config else folders.compute_dtype(checkpoint)
        job = dataclasses.replace(job, is_other_dtype=request.dtype != own)
    names = _given_names(job) if request.name else _made_names(job, stem)
    job = dataclasses.replace(job, names=names)
    for mode in request.visual_thoughts:
        paths.check_writable("--workdir", job.folder(mode))
    return job


def choose_tasks(benchmarks: Sequence[str], task_names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that `benchmarks` name, or whose family they name; all for ().

    Raises ValueError that lists the tasks of the run.
    """
    families = {
        family: module.TASK
        for family, module in task_families.FAMILIES.items()
        if module.TASK in task_names
    }
    known = {task.lower(): task for task in task_names} | families
    asked = [*task_names, *families]
    for name in benchmarks:
        if name.lower() not in known:
            raise ValueError(
                f"--benchmarks={name}: this run has the tasks {', '.join(task_names)} (or, by "
                f"family, {', '.join(families) or 'none'}){checks.did_you_mean(name, asked)}"
            )
    return tuple(dict.fromkeys(known[name.lower()] for name in benchmarks)) or tuple(task_names)


def _check_arguments(request: Request) -> None:
    """Checks each argument by itself."""
    paths.check_given("--workdir", request.workdir, orbax=True)
    for flag in ("checkpoint", "data_dir", "against"):
        paths.check(f"--{flag}", getattr(request, flag))
    for name in ("split", "protocol", "name"):
        checks.instance(f"--{name}", getattr(request, name), str, "give a text")
    checks.instance("--ban_marker", request.ban_marker, bool, "give True or False")
    if not request.visual_thoughts:
        raise ValueError(f"--visual_thoughts names nothing: choose from {', '.join(MODES)}")
    checks.choice("--on_bad_row", request.on_bad_row, ("fail", "skip"))
    cli.check_dtype(request.dtype)
    cli.check_precision()
    for mode in request.visual_thoughts:
        if mode not in MODES:
            raise ValueError(f"--visual_thoughts={mode}: {checks.choose_from(mode, MODES)}")
    cli.check_once("visual_thoughts", request.visual_thoughts)
    cli.check_once("benchmarks", request.benchmarks)
    if request.seed is not None:
        cli.check_seed(request.seed)
    if request.name:
        cli.check_name(request.name)
    cli.check_number("rows", request.rows, 0)
    cli.check_number("samples", request.samples, 0)
    if request.temperature is not None:
        checks.number("--temperature", request.temperature, float, checks.TEMPERATURE)
        if not request.samples:
            raise ValueError(
                f"--temperature={request.temperature} without --samples: answers are greedy. Give "
                "--samples=K, the number of answers that are sampled for each example"
            )
    cli.check_number("batch_size", request.batch_size, 0)
    cli.check_tensor(request.tensor)
    cli.check_compute_every(
        request.compute_every, bool(set(request.visual_thoughts) & set(GENERATED))
    )
    model.check_protocol(request.protocol)


def _choose_benchmarks(
    request: Request, config: ConfigDict | None
) -> tuple[dict[str, pathlib.Path], tuple[str, ...]]:
    """({public table: its file}, tasks of the run) that are asked.

    config: settings of the run; None for a model that is not a run.
    """
    asked, data_dir = request.benchmarks, request.data_dir
    if config is None and not data_dir:
        raise ValueError(
            f"--checkpoint={request.checkpoint} is a model without data of its own: give "
            "--data_dir=FOLDER with the public tables"
        )
    files = tables.find(data_dir) if data_dir else {}
    rest = [name for name in asked if name not in files]
    if data_dir and (wrong := [b for b in rest if b in tables.KINDS or config is None]):
        raise ValueError(
            f"--benchmarks={wrong[0]}: {data_dir} holds {', '.join(files)}"
            f"{checks.did_you_mean(wrong[0], files)}"
        )
    if not data_dir and (absent := [b for b in rest if b in tables.KINDS]):
        raise ValueError(
            f"--benchmarks={absent[0]} is a public table: give --data_dir=FOLDER that holds "
            f"{absent[0]}.tsv"
        )
    tasks: tuple[str, ...] = ()
    if config is not None and (rest or not data_dir):
        tasks = choose_tasks(rest, config.data.tasks)
    public = [name for name in asked if name in files] if asked else files
    return {name: files[name] for name in public}, tasks


def _check_modes(request: Request, *, public: bool) -> None:
    """Checks that modes, tables, protocol and marker go together."""
    by_teacher = [mode for mode in request.visual_thoughts if mode in CONTEXTS]
    if public and by_teacher:
        raise ValueError(
            f"--visual_thoughts={by_teacher[0]}: public tables hold no visual thoughts of their "
            f"rows: choose from none, {', '.join(GENERATED)}"
        )
    if request.protocol and by_teacher:
        raise ValueError(
            f"--protocol={request.protocol} with --visual_thoughts={by_teacher[0]}: the teacher's "
            "contexts are those of training, without a protocol"
        )
    if request.ban_marker and (
        request.protocol or public or set(request.visual_thoughts) & set(GENERATED)
    ):
        raise ValueError(
            "--ban_marker is for tasks of a run without a protocol and without image generation"
        )
    if request.samples and (
        request.protocol or public or set(request.visual_thoughts) & set(GENERATED)
    ):
        raise ValueError(
            "--samples is for tasks of a run without a protocol and without image generation: "
            "leave it out, or leave --protocol, --data_dir and generated images out"
        )
    if request.name and request.visual_thoughts == ("generated-swap",):
        raise ValueError(
            "--visual_thoughts=generated-swap with a --name: it shows what other rows generated in "
            "mode generated of the same name, so give --visual_thoughts=generated,generated-swap"
        )


def _choose_checkpoint(request: Request) -> tuple[str, int]:
    """(step folder, step) of a run's checkpoint: the one that was given, or the newest."""
    checkpoint = checkpoint_lib.step_folder("--checkpoint", request.checkpoint, request.workdir)
    step = checkpoint_lib.metadata(checkpoint)["step"]
    if not request.name and not checkpoint_lib.is_of_run(checkpoint, request.workdir):
        raise ValueError(
            f"--checkpoint={checkpoint} is not a step of {run_folder.checkpoints(request.workdir)}:"
            f" give --name=NAME for its results in {request.workdir}/eval"
        )
    return checkpoint, step


def _given_names(job: Job) -> dict[str, str]:
    """{mode: name of its results} of a request with a name. FileExistsError where it is taken."""
    name, modes = job.request.name, job.request.visual_thoughts
    names = {m: name if len(modes) == 1 else f"{name}-{job.label(m)}" for m in modes}
    for folder in (run_folder.evaluation(job.request.workdir, n) for n in names.values()):
        if os.path.exists(os.path.join(folder, run_folder.SUMMARY)) and not store.is_begun(folder):
            raise FileExistsError(
                f"{folder} holds results of something else: choose another --name, or delete it"
            )
    return names


def _made_names(job: Job, stem: str) -> dict[str, str]:
    """{mode: name of its results} that says what is measured.

    stem: name of the folder of a model that is not a run.
    """
    request, config, differs = job.request, job.config, []
    if request.protocol:
        differs.append(request.protocol)
    if job.tasks and request.split != config.eval.final_split:
        differs.append(request.split)
    if request.rows and any(request.rows < size for size in _sizes(job)):
        differs.append(f"random{request.rows}")
    if job.tables:
        asked = [*(table.name for table in job.tables), *job.tasks]
        differs += asked if request.benchmarks else ["public"]
    elif job.tasks != tuple(config.data.tasks):
        differs += job.tasks
    if request.samples:
        differs.append(f"samples{request.samples}")
    if request.temperature is not None:
        differs.append(f"temperature{request.temperature:g}")
    if job.seed != job.subset_seed:
        differs.append(f"seed{job.seed}")
    if job.is_other_dtype:
        differs.append(request.dtype)
    names = {mode: "-".join([job.label(mode), *differs]) for mode in request.visual_thoughts}
    own = 1 if request.protocol or not config else config.drawing.compute_every
    if request.compute_every not in (0, own):
        shown = f"-every{request.compute_every}"
        names = {mode: name + shown * (mode in GENERATED) for mode, name in names.items()}
    if job.step is None:
        return {mode: f"{stem}-{name}" for mode, name in names.items()}
    return {mode: run_folder.evaluation_name(job.step, name) for mode, name in names.items()}


def _sizes(job: Job) -> list[int]:
    """Number of examples, or questions, of each benchmark."""
    sizes = [tables.size(table) for table in job.tables]
    if job.tasks:
        folder = workdir_lib.found_data_dir(job.config, job.request.workdir)
        split = job.request.split
        sizes += [
            len(arrayrecord.open_source(folder, split, task=task, asked_by="--split"))
            for task in job.tasks
        ]
    return sizes
