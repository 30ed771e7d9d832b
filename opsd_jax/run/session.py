"""An opened run: settings, devices, tokenizer, data and writers, assembled in this one place.

train and its control arms           open_training   makes data that are absent; writes metrics
eval, diagnose, generate, redraw     open_run        only reads
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence

import jax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check, rollout, sharding, tokenizer
from opsd_jax.data import procedural
from opsd_jax.data import shards as shards_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.examples import Examples, Preprocessor
from opsd_jax.data.packing import Packer
from opsd_jax.evaluation import results, summary_tables
from opsd_jax.inputs import calls, checks, cli
from opsd_jax.marker import Marker
from opsd_jax.method_config import RolloutConfig
from opsd_jax.model import attention, bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import folders
from opsd_jax.run import attention_check, placement
from opsd_jax.run.checks import check_batch
from opsd_jax.runtime import checkpoint, metrics, run_folder
from opsd_jax.runtime import clock as clock_lib
from opsd_jax.runtime import profile as profile_lib
from opsd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The table of a run and its control arms. Printing it prints `text`.

    Attributes:
      text: the table and what it says, Markdown, as in W/report.md.
      records: one dict per row: "who" answered ("teacher", "start", "OPSD", "arm noise", "baseline"
        and more, see W/report.json), "arm" (the same in words), "task", and the scores of
        W/report.json under their names there. `pandas.DataFrame(report.records)` is the table.
    """

    text: str
    records: list[dict]

    def __str__(self) -> str:
        return self.text

    __repr__ = _repr_markdown_ = __str__  # also in notebooks


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Session:
    """An opened run: everything except its weights.

    Its fields stay the same while it is open. The clock counts and the writer writes, and programs
    and digests are kept once they are made.

    Attributes:
      config: all settings of the run.
      workdir: folder of the run (or of the control arm).
      data_dir: folder of its prepared data, a TFDS data_dir.
      model: sizes of the network, and how it is computed.
      mesh: devices, with the axes of `sharding`.
      sampling_mesh: the same devices in the same order, as answers are sampled on them.
      tokenizer: the tokenizer of the run's data.
      marker: finds the image-start marker in a stream of tokens.
      packer: packs prepared examples into contexts of the configured buckets.
      clock: counts the wall time of each phase.
      writer: writes metrics and samples; in a session that only reads it writes nothing.
      profile: traces some of the steps; in a session that only reads none.
      known_digests: of a run that trains, `digests` when it was opened: data that change until the
        first save are not the run's. None: they are computed when they are asked for.
    """

    config: ConfigDict
    workdir: str
    data_dir: str
    model: ModelConfig
    mesh: Mesh
    sampling_mesh: Mesh
    tokenizer: Tokenizer
    marker: Marker
    packer: Packer
    clock: clock_lib.Clock
    writer: metrics.Writer
    profile: profile_lib.Profile
    known_digests: dict | None = None

    @functools.cached_property
    def record(self) -> dict:
        """The settings as JSON, as in W/config.json and in every checkpoint."""
        return config_lib.to_json(self.config)

    @functools.cached_property
    def digests(self) -> dict:
        """{"data": {task: digest of its prepared files}, "tokenizer": digest}.

        In chat form also "chat_template": digest.
        """
        if self.known_digests is not None:
            return self.known_digests
        data = shards_lib.digests(self.data_dir, self.config.data.tasks)
        found = {"data": data, "tokenizer": self.tokenizer.digest}
        if self.tokenizer.chat:
            found["chat_template"] = self.tokenizer.chat.digest
        return found

    @property
    def prompts_record(self) -> dict:
        """What the texts of contexts depend on, for the identity of results, besides tokens.

        In BAGEL's form it is that of older versions.
        """
        found = {**self.record["prompts"]}
        if self.tokenizer.chat:
            return found | {"template": self.tokenizer.chat.digest}
        return {key: value for key, value in found.items() if key not in ("form", "thinking")}

    def __repr__(self) -> str:
        stages = ", ".join(self.config.stages)
        return f"<run in {self.workdir}: stages {stages}, seed {self.config.seed}>"

    def __dir__(self) -> list[str]:
        """What a reader of the run needs; everything else is there, too, for the commands."""
        return [
            *("config", "evaluations", "examples", "page", "predictions", "read_metrics", "report"),
            *("checkpoint_folder", "data_dir", "model", "restore_params", "tokenizer", "workdir"),
        ]

    @property
    def page(self) -> str:
        """Path of the run's page, W/report.html, which a finished run has."""
        return run_folder.page(self.workdir)

    def read_metrics(self) -> list[dict]:
        """The records of metrics.jsonl, one dict per logged step."""
        return metrics.read(run_folder.metrics(self.workdir))

    def report(self) -> Report:
        """The table of the finished run and its control arms.

        Raises FileNotFoundError before the run has ended, ValueError for a damaged file.
        """
        path, text = run_folder.report_data(self.workdir), run_folder.report(self.workdir)
        if not (os.path.exists(path) and os.path.exists(text)):
            run = run_folder.run_of(self.workdir)
            again = "the run's command writes it when the run is done"
            fix = f"open the run of this arm, {run}" if run else again
            raise FileNotFoundError(
                f"{path} is missing: {fix}. evaluations() has what has been evaluated"
            )
        try:
            with open(path, encoding="utf-8") as file:
                records = [
                    {"who": row.get("who", row["arm"]), "arm": row["arm"], "task": task, **scores}
                    for row in json.load(file)
                    for task, scores in row["tasks"].items()
                ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}): give the run's command again, which writes it"
            ) from error
        with open(text, encoding="utf-8") as file:
            return Report(file.read(), records)

    def evaluations(self) -> dict[str, dict]:
        """{name: content of summary.json} of the finished evaluations, W/eval/NAME, by name."""
        return summary_tables.read_all(self.workdir)

    def predictions(self, name: str) -> list[dict]:
        """The answers of a finished evaluation, one dict per line of predictions.jsonl.

        Args:
          name: a key of `evaluations`, such as "000500-none".
        Raises:
          FileNotFoundError: there is no such evaluation. ValueError: a damaged file.
        """
        checks.instance("name", name, str, 'give a key of evaluations(), such as "000500-none"')
        folder = run_folder.evaluation(self.workdir, name)
        if not os.path.isfile(os.path.join(folder, run_folder.PREDICTIONS)):
            known = self.evaluations()
            raise FileNotFoundError(
                f"{self.workdir} has no evaluation {name!r}: choose from "
                f"{', '.join(known) or 'none so far'}{checks.did_you_mean(name, known)}"
            )
        return results.read_predictions(folder)

    def preprocessor(self, *, generation: bool = False) -> Preprocessor:
        """How examples are turned into tokens and patches.

        generation: also into images as the autoencoder sees them.
        """
        return Preprocessor.from_config(self.config, self.tokenizer, generation=generation)

    def examples(
        self, split: str, *, generation: bool = False, asked_by: str = "", stage: str = ""
    ) -> Examples:
        """Prepared examples of a split.

        Args:
          generation: see `preprocessor`.
          asked_by: the setting or flag that names the split, for messages.
          stage: the stage that they are for; "" for all that the run has.
        """
        data = config_lib.data_of(self.config, stage)
        preprocess = self.preprocessor(generation=generation)
        return Examples.open(data, self.data_dir, split, preprocess, asked_by=asked_by)

    @functools.cached_property
    def program_config(self) -> ConfigDict:
        """The settings as programs have them: `config` with the attention that was chosen."""
        config = self.config.copy_and_resolve_references()
        config.model.attention = self.model.attention
        return config

    def sampling(self, **changes) -> RolloutConfig:
        """Config of the training rollouts, with changes by name."""
        shards = sharding.batch_divisor(self.sampling_mesh)
        return config_lib.rollout(
            self.program_config, self.tokenizer, self.marker, shards=shards, **changes
        )

    def evaluation_sampling(self, **changes) -> RolloutConfig:
        """Config of greedy answers in evaluations, with changes by name."""
        own = dict(
            greedy=True,
            slots=self.config.eval.slots,
            refill=0,
            max_new_tokens=self.answer_budget,
        )
        return self.sampling(**own | changes)

    @property
    def answer_budget(self) -> int:
        """Budget of tokens of an answer in evaluations, bos included."""
        return self.config.eval.max_new_tokens or self.config.rollout.max_new_tokens

    def abstract_params(self, layout: str = "train"):
        """Shapes, dtypes and shardings of the weights, which restoring a checkpoint needs.

        layout: as of `restore_params`.
        """
        if layout == "rollout":
            return placement.abstract_weights(self.model, self.sampling_mesh)
        shapes = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=self.model))
        return sharding.abstract(self.mesh, shapes, layout)

    def restore_params(self, checkpoint_folder: str, layout: str = "train"):
        """The weights in a checkpoint of the run.

        A session whose `model` does not generate images leaves the weights for that on disk.

        Args:
          layout: "train" for the update and for scoring; "rollout" for the sampler, in the dtype of
            the computation: what `for_sampling` makes of the others.
        """
        partial = self.config.model.generation.on and self.model.generation is None
        abstract = self.abstract_params(layout)
        return checkpoint.restore_params(checkpoint_folder, abstract, partial=partial)

    def for_sampling(self, params, *, int8: bool = False):
        """The weights laid out for the sampler, in the dtype of the computation.

        One program is compiled for each layout that weights come in.

        int8: whether matrices are rounded to int8, as config.rollout.int8 says of the samples that
          a stage trains on.
        """
        places = (int8, *((x.dtype, x.sharding) for x in jax.tree.leaves(params)))
        if places not in self._relayouts:
            self._relayouts[places] = rollout.relayout_program(
                self.sampling_mesh, params, self.config.model.dtype, int8
            )
        return self._relayouts[places](params)

    @functools.cached_property
    def _relayouts(self) -> dict:
        return {}

    def checkpoint_folder(self, step: int) -> str:
        """Folder of the run's checkpoint of a step."""
        return run_folder.checkpoint(self.workdir, step)

    def results_folder(self, step: int, name: str) -> str:
        """Folder of the results of an evaluation of the run's checkpoint of a step."""
        return run_folder.evaluation(self.workdir, run_folder.evaluation_name(step, name))


def open_run(
    workdir: str | os.PathLike[str],
    *,
    tasks: str | Sequence[str] = (),
    mesh: Mesh | None = None,
    tokenizer_folder: str = "",
    dtype: str = "",
) -> Session:
    """Opens the run (or control arm) in a folder for reading: evaluation, diagnosis, generation.

    Args:
      tasks: one or some of the run's tasks; () for all of them.
      mesh: None for all devices, with copies of the model on as few as it fits on (`placement`).
      tokenizer_folder: "" for the tokenizer of the run. With another one the data need not exist.
      dtype: compute dtype, "float32" or "bfloat16"; "" for config.model.dtype.
    Raises:
      FileNotFoundError: no run, no data or no tokenizer. ValueError: damaged settings, or a task
        that the run does not have. TypeError: something else than a path.
    """
    checks.path("workdir", workdir)
    if mesh is not None:
        checks.instance("mesh", mesh, Mesh, "give a jax.sharding.Mesh, or None for all devices")
    fix = "give a folder, or '' for the tokenizer of the run"
    checks.instance("tokenizer_folder", tokenizer_folder, (str, os.PathLike), fix)
    workdir = os.fspath(workdir)
    config = workdir_lib.load_config(workdir)
    tasks = calls.names("tasks", tasks)
    checks.names("tasks", tasks, tuple(config.data.tasks))
    find = workdir_lib.data_dir if tokenizer_folder else workdir_lib.found_data_dir
    data_dir = find(config, workdir)
    if tasks:
        config = workdir_lib.with_tasks(config, tasks)
    cli.check_dtype(dtype)
    config = with_dtype(config, dtype)
    mesh = mesh or placement.of_run(config)
    return _open(config, workdir, data_dir, mesh, clock_lib.Clock(), tokenizer_folder)


def with_dtype(config: ConfigDict, dtype: str) -> ConfigDict:
    """The settings with another compute dtype; "" for their own."""
    if not dtype:
        return config
    config = config.copy_and_resolve_references()
    config.model.dtype = dtype
    return config


def open_training(
    config: ConfigDict,
    workdir: str,
    data_workdir: str,
    checkpoints: checkpoint.Checkpoints,
) -> tuple[Session, int | None]:
    """Opens a run for training: records its settings, makes absent data, opens its metrics.

    A run that has saved its initial weights and logged nothing starts anew if settings, data or
    tokenizer are others now.

    Args:
      data_workdir: folder of the run whose data and tokenizer are used if the settings name none.
      checkpoints: those of the run.
    Returns:
      The session, and the step of the checkpoint that the run continues from; None at the start.
    Raises:
      ConfigMismatchError: settings, data or tokenizer differ from those of the checkpoint.
    """
    done = checkpoints.latest()
    try:
        return _open_training(config, workdir, data_workdir, checkpoints, done), done
    except config_check.ConfigMismatchError:
        if done != 0 or workdir_lib.has_logged(workdir):
            raise
        logging.info("%s holds no step of its settings or data of before: starting anew", workdir)
        checkpoints.discard(done)
        return _open_training(config, workdir, data_workdir, checkpoints, None), None


def _open_training(
    config: ConfigDict,
    workdir: str,
    data_workdir: str,
    checkpoints: checkpoint.Checkpoints,
    done: int | None,
) -> Session:
    """`open_training` of a run that continues from the checkpoint of a step, or starts (None)."""
    record = config_lib.to_json(config)
    saved = None
    if done is not None:
        saved = checkpoints.metadata(done)
        config_check.check_unchanged(saved["config"], record, workdir=workdir)
        logging.info("continuing %s at step %d (%s)", workdir, done, saved["stage"])
    workdir_lib.write_record(workdir, record)
    clock = clock_lib.Clock()
    primary = jax.process_index() == 0
    mesh = sharding.make_mesh(**config.mesh)
    attention.check_platform(config.model.attention, mesh.devices.flat[0].platform)
    for stage in config.stages:
        check_batch(config, stage, sharding.batch_divisor(mesh))
    sampling_mesh = placement.of_rollouts(config, mesh)
    data_dir = workdir_lib.data_dir(config, data_workdir)
    with clock("data"):
        if primary:
            procedural.make_if_absent(config_lib.data(config), data_dir)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("data is made")
        session = _open(config, workdir, data_dir, mesh, clock)
        session = dataclasses.replace(session, sampling_mesh=sampling_mesh)
        digests = session.digests
    if saved:
        config_check.check_digests(
            saved.get("digests") or {}, digests, accepted=config.checkpoint.accept_changed
        )
    elif config.init_from:
        # A control arm trains on the run's data, too.
        own = digests if run_folder.run_of(workdir) else {"tokenizer": digests["tokenizer"]}
        config_check.check_digests(
            _digests_of_origin(config.init_from),
            own,
            whose=config.init_from,
            accepted=config.checkpoint.accept_changed,
        )
    workdir_lib.write_places(workdir, record)
    writer = metrics.Writer(  # last: it sets aside lines of steps that will be repeated
        workdir,
        primary=primary,
        tensorboard=config.log.tensorboard,
        wandb=metrics.wandb_arguments(config.log.wandb, workdir, data_workdir, record),
        resume_step=(done or 0) + 1,
    )
    profile = profile_lib.Profile(run_folder.profile(workdir), config.log.profile_steps, done)
    return dataclasses.replace(session, writer=writer, profile=profile, known_digests=digests)


def _open(
    config: ConfigDict,
    workdir: str,
    data_dir: str,
    mesh: Mesh,
    clock: clock_lib.Clock,
    tokenizer_folder: str = "",
) -> Session:
    named = tokenizer_folder or config.tokenizer
    folder = workdir_lib.tokenizer_folder(named, data_dir)
    tok = config_lib.load_tokenizer(config, folder)
    return Session(
        config=config,
        workdir=workdir,
        data_dir=data_dir,
        model=dataclasses.replace(
            config_lib.model(config),
            attention=attention_check.chosen(config, mesh.devices.flat[0].platform),
        ),
        mesh=mesh,
        sampling_mesh=mesh,
        tokenizer=tok,
        marker=Marker.build(tok.token_bytes, config.model.llm.vocab_size),
        packer=Packer.from_config(config, tok),
        clock=clock,
        writer=metrics.Writer(workdir, primary=False),
        profile=profile_lib.Profile(run_folder.profile(workdir), ()),
    )


def _digests_of_origin(origin: str) -> dict:
    """Digests that the weights have which a run starts from: of the tokenizer at most, or none, for
    a model; of a run's checkpoint also of its data.
    """
    if not folders.is_model(origin):
        return checkpoint.metadata(origin).get("digests") or {}
    folder = folders.tokenizer_folder(origin)
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return {}
    model = folders.read_config(origin)
    form = "bagel" if model.is_bagel else ""
    found = tokenizer.load(folder, images=model.vit is not None, form=form)
    return {"tokenizer": found.digest}
