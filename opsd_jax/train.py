"""A run, top to bottom: `python -m opsd_jax.train --config=configs/mini.py --workdir=W`.

  settings -> data -> mesh -> model -> for each stage: (restore or start) -> loop -> checkpoint, evaluation -> arms

A run is a sequence of stages (`autoencoder`, `warmup`, `opsd`, `sft`, `offline`); step numbers go on from stage to
stage. If W holds a run, it continues where that stopped, exactly. `--arm=NAME` runs one of the config's control arms
in W/arms/NAME, from the weights with which W's first OPSD step began.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import signal
import sys
import time
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from opsd_jax import cli, config as config_lib, paths
from opsd_jax.distributed import EXIT_STOPPED

# What may change between a run and its continuation.
_FREE = (
    "log",
    "health",
    "eval",
    "checkpoint.keep_latest",
    "checkpoint.accept_changed",
    "data.threads",
    "data.prefetch",
    "data.cache_rows",
    "mesh",
    "arms",
    "run_arms",
)

config_flags.DEFINE_config_file(
    "config", None, "File with get_config(); see configs/.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Folder of the run; continues the run that it holds.")
flags.DEFINE_string(
    "arm", "", "Run this arm of the config, from the warm-up of the run in --workdir."
)


@dataclasses.dataclass
class Run:
    """What all stages share. Made once by `prepare`; nothing in it changes while training."""

    config: object
    workdir: str
    data_workdir: str
    mesh: object
    tokenizer: object
    marker: object
    packer: object
    digests: dict
    clock: object
    writer: object

    def rollout(self, **changes):
        from opsd_jax import sharding

        shards = sharding.batch_divisor(self.mesh)
        return config_lib.rollout(
            self.config, self.tokenizer, self.marker, shards=shards, **changes
        )


def main(argv) -> None:
    """The command: one run and then its arms, or one arm. What is wrong with settings, files or data, or with the run's
    health, is told in one line; --verbosity=1 adds where in the code."""
    from opsd_jax import arms, distributed, metrics

    cli.start()
    # Orbax and TFDS tell much; a run's terminal shows what this package says, and warnings.
    logging.get_absl_handler().addFilter(
        lambda record: "opsd_jax" in record.pathname or record.levelno >= 30
    )
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if workdir is None or config is None:
        raise app.UsageError("give --config=configs/mini.py and --workdir=FOLDER")
    try:
        _run(config, workdir, flags.FLAGS.arm)
    except (ValueError, OSError, metrics.UnhealthyRun, arms.ArmsFailed) as error:
        if distributed.peer_is_lost(error):
            raise
        logging.debug("where the error comes from:", exc_info=error)
        distributed.end_with_error(error)


def _run(config, workdir: str, arm: str) -> None:
    from opsd_jax import arms, distributed

    check(config, workdir)
    several = distributed.initialize()
    if several and config.run_arms and not arm:
        raise ValueError(
            "several processes cannot start arms: add --config.run_arms='()', and run each arm by a "
            "command of its own, with --arm=NAME, when this run is done"
        )
    import jax

    if not os.environ.get(
        "JAX_COMPILATION_CACHE_DIR"
    ):  # arms compile the same programs, and so does a continued run
        jax.config.update(
            "jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), "xla_cache")
        )
    if arm:
        train(*arms.settings_of(config, workdir, arm), data_workdir=workdir)
        return
    if (
        not several
    ):  # JAX tells all processes of a SIGTERM to one; a handler set here would replace its own
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)  # while training, `train` handles them
    with arms.Arms(config.run_arms, workdir, sys.argv[1:]) as controls:
        train(config, workdir, on_warm=controls.start)
        controls.finish()
    if config.run_arms:
        print(arms.report(workdir, config.run_arms))


def _stop(number, frame) -> None:
    """Ends the command where it does not train itself; arms that run save and stop first (`arms.Arms`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C again aborts at once
    print(
        f"{signal.Signals(number).name}: stopping, and arms that run with it; the same command continues",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(EXIT_STOPPED)


class _ConfigFile(flags.ArgumentParser):
    """Reads FILE or FILE:ARGUMENT; what is wrong in the file ends the command with one line that names it."""

    def parse(self, path):
        file, _, argument = path.partition(":")
        spec = importlib.util.spec_from_file_location("config_file", file)
        try:
            if not os.path.isfile(file) or spec is None:
                raise ValueError(
                    "there is no such Python file: give one with get_config(), such as configs/mini.py"
                )
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise ValueError(
                    "it has no function get_config(), which returns the settings; see configs/mini.py"
                )
            config = module.get_config(*[argument] if argument else [])
            if not isinstance(config, ConfigDict):
                raise ValueError(
                    f"get_config() returned {config!r:.40}: return the ConfigDict of "
                    "opsd_jax.config.default(), with changed values"
                )
        except Exception as error:  # whatever the file does
            origin, said = spec and spec.origin, str(error).partition("\n")[0]
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == origin
            ]
            if isinstance(error, SyntaxError) and error.filename == origin:
                lines = [error.lineno]
            if not isinstance(error, (ValueError, OSError)):
                said = f"{type(error).__name__}: {said}"
            where = f"{file}, line {lines[-1]}: " if lines else f"{file}: "
            sys.exit(f"error: {said}" if said.startswith(path) else f"error: {where}{said}")
        return config.lock()


flags.FLAGS["config"].parser = _ConfigFile()


def parse_flags(argv):
    """The arguments left over. An override of a setting that does not exist ends the program with a suggestion."""
    for argument in argv:
        name, _, value = argument.partition("=")
        if name.lstrip("-") == "config":
            _check_path("--config", value)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:
        for argument in argv:
            key = re.match(r"--?(?:no)?config\.([^=]+)", argument)
            if key and key[1] not in config_lib.default_values():
                sys.exit(f"error: {argument}: {config_lib.unknown(key[1])}")
        raise error


def _check_path(flag, path, **options) -> None:
    """Ends the command where a path cannot be used (`paths.check_given`)."""
    try:
        paths.check_given(flag, path, **options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def check(config, workdir: str, data_workdir: str = "") -> None:
    """ValueError or FileNotFoundError for what would fail later, in the run or in an arm that it starts; nothing is made.

    data_workdir: as in `train`.
    """
    cli.check_precision()
    paths.check_given("--workdir", workdir, orbax=True)
    config_lib.check(config)
    _check_there(config, workdir, data_workdir or workdir)
    for name in config.run_arms:
        try:
            _check_there(config_lib.arm(config, name), os.path.join(workdir, "arms", name), workdir)
        except (ValueError, OSError) as error:
            raise ValueError(f"config.arms.{name}: {error}") from None


def _check_there(config, workdir: str, data_workdir: str) -> None:
    """What a run reads is there: its data or how to make them, a tokenizer, and what it starts from."""
    from opsd_jax import checkpoint, convert, data

    if config.init_from and not convert.is_released(
        config.init_from
    ):  # before what is looked for at any path
        paths.check("config.init_from", config.init_from, orbax=True)
    data.check_there(config, data_workdir)
    if (
        config.init_from
        and not convert.is_model(config.init_from)
        and not checkpoint.is_begun(workdir)
    ):
        try:
            checkpoint.resolve(config.init_from)
        except checkpoint.CheckpointNotFound as error:
            raise checkpoint.CheckpointNotFound(
                f"config.init_from={config.init_from!r} is no model and holds no checkpoint: {error}"
            ) from None


def train(config, workdir: str, *, data_workdir: str = "", on_warm=lambda: None):
    """Runs (or continues) a run and returns its final parameters.

    on_warm: called when the checkpoint is there that the OPSD stage starts from.
    data_workdir: whose data and tokenizer are used where the config names none.
    """
    import jax

    from opsd_jax import checkpoint, locks

    check(config, workdir, data_workdir)
    ends = config_lib.stage_ends(config)
    lock = locks.only_writer(workdir, inside=True, primary=jax.process_index() == 0)
    with (
        lock,
        checkpoint.install_sigterm() as stop,
        checkpoint.Checkpoints(
            os.path.join(workdir, "checkpoints"),
            keep_latest=config.checkpoint.keep_latest,
            keep_steps=[0, *ends.values()],
        ) as checkpoints,
    ):
        record_config(config, workdir)
        done, saved = checkpoints.latest(), None
        if done is not None:
            saved = checkpoints.metadata(done)
            checkpoint.check_config(
                saved["config"], config, ignore=_FREE, defaults=config_lib.default()
            )
            logging.info("continuing %s at step %d (%s)", workdir, done, saved["stage"])
        run = prepare(
            config, workdir, data_workdir or workdir, resume_step=(done or 0) + 1, saved=saved
        )
        with run.writer, _said_when_stopped(workdir, checkpoints):
            # With done = 350 and stages warmup (0..350], opsd (350..750]: warmup has no step left but is evaluated, if
            # that is missing, and opsd starts from its parameters. With done = 500 warmup is skipped and opsd goes on
            # with the state of step 500.
            first, params = 0, None
            for stage in config.stages:
                if done is None or done <= ends[stage]:
                    if params is None and (done is None or done == first):
                        params = initial_params(run, done)
                    params = train_stage(
                        run,
                        stage,
                        first,
                        ends[stage],
                        params,
                        checkpoints,
                        done,
                        stop,
                        on_start=on_warm if stage == "opsd" else lambda: None,
                    )
                    stop.check()
                first = ends[stage]
            print(f"{workdir}: where the time went\n{run.clock.table()}")
            _write_json(os.path.join(workdir, "time.json"), run.clock.report())
    return params


@contextlib.contextmanager
def _said_when_stopped(workdir, checkpoints):
    """Says how a run that is asked to stop goes on, once its last checkpoint is complete."""
    from opsd_jax import checkpoint

    try:
        yield
    except checkpoint.Stopped:
        checkpoints.wait()  # a save that fails is no stop as asked
        print(f"stopped as asked; the same command continues {workdir}")
        raise


def record_config(config, workdir: str) -> None:
    """Writes W/config.json; ConfigMismatch if W holds a run with other settings.

    A run that has not logged a step, because it failed at once, has nothing to protect: its record is replaced.
    """
    from opsd_jax import checkpoint, data

    record, path = checkpoint.config_to_json(config), os.path.join(workdir, "config.json")
    rows = os.path.join(workdir, "metrics.jsonl")
    if os.path.exists(path) and os.path.exists(rows) and os.path.getsize(rows):
        checkpoint.check_config(
            data.read_record(workdir), record, ignore=_FREE, defaults=config_lib.default()
        )
    else:
        _write_json(path, record)


def prepare(
    config, workdir: str, data_workdir: str, resume_step: int | None, saved: dict | None = None
) -> Run:
    """Makes everything of a run that is not weights: mesh, data, tokenizer, writers.

    saved: the metadata of the checkpoint that it continues from, None at the start. ConfigMismatch where the data or the
    tokenizer have another content now.
    """
    import jax

    from opsd_jax import checkpoint, data, metrics, rollout, sharding, tokenizer
    from opsd_jax.datasets import visual_opsd
    from opsd_jax.model import attention

    clock = metrics.Clock()
    primary = jax.process_index() == 0
    mesh = sharding.make_mesh(**config.mesh)
    attention.check_platform(config.model.attention, mesh.devices.flat[0].platform)
    for stage in config.stages:
        check_batch(config, stage, sharding.batch_divisor(mesh))
    with clock("data"):
        if primary:
            data.make_if_absent(config, data_workdir)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("data is there")
        tok = tokenizer.load(
            data.tokenizer_folder(config, data_workdir), vocab_size=config.model.llm.vocab_size
        )
        where = data.folder(config, data_workdir)
        digests = {
            "data": {task: visual_opsd.digest(where, task) for task in config.data.tasks},
            "tokenizer": tok.digest,
        }
    if saved:
        checkpoint.check_digests(
            saved.get("digests") or {}, digests, accepted=config.checkpoint.accept_changed
        )
    elif config.init_from:
        checkpoint.check_digests(
            _tokenizer_of_origin(config),
            {"tokenizer": tok.digest},
            whose=config.init_from,
            accepted=config.checkpoint.accept_changed,
        )
    marker = rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size)
    writer = metrics.Writer(
        workdir,
        primary=primary,
        tensorboard=config.log.tensorboard,
        wandb=wandb_arguments(config, workdir, data_workdir),
        resume_step=resume_step,
    )
    return Run(
        config,
        workdir,
        data_workdir,
        mesh,
        tok,
        marker,
        data.Packer(config, tok),
        digests,
        clock,
        writer,
    )


def _tokenizer_of_origin(config) -> dict:
    """{"tokenizer": digest} of the weights that a run starts from; {} where they have no tokenizer with them."""
    from opsd_jax import checkpoint, convert, tokenizer

    if not convert.is_model(config.init_from):
        return checkpoint.metadata(config.init_from).get("digests") or {}
    folder = convert.tokenizer_folder(config.init_from)
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return {}
    return {"tokenizer": tokenizer.load(folder).digest}


def wandb_arguments(config, workdir: str, data_workdir: str) -> dict | None:
    """What a run tells Weights & Biases about itself, None if it does not log there. A run and its arms are one group."""
    from opsd_jax import checkpoint

    if not config.log.wandb:
        return None
    name, group = (os.path.basename(os.path.abspath(folder)) for folder in (workdir, data_workdir))
    return {
        "project": config.log.wandb,
        "name": name,
        "group": group,
        "config": checkpoint.config_to_json(config),
    }


def check_batch(config, stage: str, shards: int) -> None:
    """ValueError where the rows of a stage's micro step, or of its evaluation, do not fill the batch shards of a mesh."""
    s = config[stage]
    micro = s.batch_size // s.accumulation
    if micro % shards:
        raise ValueError(
            f"a micro step of config.{stage} has {micro} rows (batch_size {s.batch_size} / accumulation {s.accumulation}) for "
            f"{shards} batch shards (mesh data x fsdp): lower config.{stage}.accumulation, raise "
            f"config.{stage}.batch_size, or give devices to config.mesh.tensor"
        )
    if (config.eval.every or config.eval.final_split) and config.eval.batch_size % shards:
        raise ValueError(
            f"config.eval.batch_size {config.eval.batch_size} must be a multiple of the {shards} batch shards of "
            "config.mesh"
        )


def initial_params(run: Run, done):
    """The weights that the first stage starts from, laid out on the mesh."""
    import jax

    from opsd_jax import checkpoint, convert, params as params_lib, sharding
    from opsd_jax.model import bagel

    config, model = run.config, config_lib.model(run.config)
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    shardings = sharding.tree(run.mesh, abstract)
    if done is not None or config.init_from:
        source = (
            os.path.join(run.workdir, "checkpoints", str(done))
            if done is not None
            else config.init_from
        )
        if convert.is_model(source):
            found = convert.read_config(source, generation=bool(model.generation))
            if model.generation:  # how training times are drawn is no size
                shift = model.generation.timestep_shift
                found = dataclasses.replace(
                    found, generation=dataclasses.replace(found.generation, timestep_shift=shift)
                )
            if (found.llm, found.vit, found.generation) != (model.llm, model.vit, model.generation):
                raise ValueError(
                    f"{source} has sizes {found}, config.model says {model}: set config.model to them"
                )
            _, params = convert.load(
                source, generation=bool(model.generation), mesh=run.mesh
            )  # float32
        else:
            there = checkpoint.metadata(source)["config"].get("lora") or {}
            here = checkpoint.config_to_json(config.lora)
            if there.get("rank") and there != here:
                raise ValueError(
                    f"{source} has adapters of config.lora {there}, this run has {here}: set config.lora to "
                    "theirs, or start from what `python -m opsd_jax.convert export` makes of it"
                )
            wanted = sharding.abstract(run.mesh, abstract)
            if model.lora and not there.get("rank"):
                _, wanted = params_lib.partition(wanted)
            params = checkpoint.restore_params(source, wanted)
        if model.lora and "lora" not in params_lib.count(
            params
        ):  # new adapters, without effect so far
            adapters = jax.jit(
                lambda key: params_lib.partition(bagel.init(key, config=model))[0],
                out_shardings=params_lib.partition(shardings)[0],
            )
            params = params_lib.merge(adapters(jax.random.key(config.seed)), params)
    else:
        init = jax.jit(lambda key: bagel.init(key, config=model), out_shardings=shardings)
        params = init(jax.random.key(config.seed))
    counts = params_lib.count(params)
    logging.info("parameters: %s", ", ".join(f"{group} {n:,}" for group, n in counts.items()))
    return params


def train_stage(
    run: Run, stage: str, first: int, last: int, params, checkpoints, done, stop, on_start
):
    """Steps first + 1 .. last of a run: one stage with its own optimizer and schedule. Returns the parameters to go
    on from, those of its last checkpoint.

    params: the weights to start from; not used where a checkpoint of this stage is continued. on_start: called when
    the checkpoint of those weights is complete. Raises Stopped where `stop` is set, between steps or batches of an
    evaluation; what was done by then is saved.
    """
    import jax

    from opsd_jax import checkpoint, data, distill, metrics, offline, rollout, sharding

    config, clock = run.config, run.clock
    distill_config = config_lib.distill(config, stage, run.tokenizer)
    rollout_config = run.rollout()
    on_policy, draws = stage == "opsd", config_lib.draws(config, stage)

    # data first: what is wrong with them shows before anything is saved
    rows = data.Rows(config, run.data_workdir, run.tokenizer, "train", drawing=draws)
    make_batches = offline.Batches if stage == "offline" else data.Batches
    batches = make_batches(
        config,
        run.workdir,
        stage,
        rows,
        run.packer,
        share=sharding.local_rows(run.mesh, config[stage].batch_size),
    )
    evaluation, evaluates = Evaluation(run, stage, stop), stage != "autoencoder"

    if stage == "offline" and (done is None or done < last):
        with clock(
            "collect"
        ):  # in the middle of the stage the teacher is read again, before the optimizer takes its room
            batches.cache = offline.collect(
                initial_params(run, first) if params is None else params,
                config,
                run.workdir,
                rows,
                run.packer,
                run.mesh,
                before_batch=stop.check,
            )

    # state: fresh from the parameters, or as the checkpoint left it
    make_state = lambda p: distill.init_state(p, distill_config)
    if done is not None and first < done:
        from opsd_jax.model import bagel

        abstract = jax.eval_shape(
            lambda: make_state(bagel.init(jax.random.key(0), config=distill_config.model))
        )
        with clock("checkpoint"):
            state = checkpoints.restore(done, sharding.abstract(run.mesh, abstract))
        start = done
    else:
        shardings = sharding.tree(run.mesh, jax.eval_shape(make_state, params))
        state = jax.jit(make_state, out_shardings=shardings)(params)
        start = first
        # where arms, the KL and diagnostics start from
        if stage in ("opsd", "sft", "offline") and checkpoints.latest() is None:
            _save(run, checkpoints, start, state, stage, distill_config)
            checkpoints.wait()
    on_start()

    stream = batches.stream(start, last) if start < last else iter(())
    buckets = batches.plan.num_buckets
    health = metrics.Health(**config.health)
    if start > first:
        history = [
            row
            for row in metrics.read(os.path.join(run.workdir, "metrics.jsonl"))
            if row["stage"] == stage
        ]
        health.replay(history)
        if evaluation.is_due(start, last) and evaluation.is_missing(
            start, history
        ):  # the run was stopped while it evaluated
            evaluation.during(start, state, distill_config, health)
    means, window, shown_at = metrics.Means(), time.perf_counter(), start
    for_sampling = on_policy and distill.for_sampling(run.mesh, state["params"], config.model.dtype)
    sample_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    guard = metrics.CompileGuard()
    step_of = {
        "autoencoder": distill.autoencoder_step,
        "opsd": distill.update_step,
        "offline": offline.step,
    }
    update = distill.program(
        step_of.get(stage, distill.drawn_step if draws else distill.sft_step), state, distill_config
    )
    draw_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    guard.watch("update", update, update._cache_size() + buckets)
    if not draws:  # there what is drawn for samples/ has shapes of its own
        guard.watch(
            "sample", rollout.sample, rollout.sample._cache_size() + buckets + evaluation.signatures
        )

    stop.check()
    with metrics.Progress(
        last,
        f"{os.path.basename(os.path.normpath(run.workdir))}",
        stage,
        start=start,
        primary=jax.process_index() == 0,
    ) as progress:
        for step in range(start, last):
            stop.promise = "saving after this step, then stopping"
            with clock("data"):
                host_batch, prepared = next(stream)
                batch = sharding.put_batch(run.mesh, host_batch)
            if on_policy:
                with clock("sample"):
                    rollout_params = for_sampling(state["params"])
                    key = jax.random.fold_in(sample_key, step)
                    trajectory = rollout.sample(
                        rollout_params, batch.student, key, config=rollout_config
                    )
                    attempt = 0
                    while attempt < config.rollout.empty_retries and not _all_spoke(trajectory):
                        attempt += 1
                        host_batch, prepared = batches.opsd(step, attempt)
                        batch = sharding.put_batch(run.mesh, host_batch)
                        trajectory = rollout.sample(
                            rollout_params,
                            batch.student,
                            jax.random.fold_in(key, attempt),
                            config=rollout_config,
                        )
                    del rollout_params  # the update wants its room
                with clock("update"):
                    state, found = update(state, batch, trajectory)
                    jax.block_until_ready(state["step"])
                found["empty_retries"] = attempt
                found["slot_utilisation"] = rollout.utilisation(trajectory, config.rollout.slots)
            else:
                with clock("update"):
                    state, found = update(
                        state, batch, *([jax.random.fold_in(draw_key, step)] if draws else [])
                    )
                    jax.block_until_ready(state["step"])
            profile = found.pop("jsd_by_position", None)
            means.add({name: (value, 1) for name, value in found.items()})
            now = step + 1

            if step == start and start == first and stage != "autoencoder":
                _show_batch(run, stage, now, prepared, getattr(host_batch, "traces", host_batch))
            if draws and (
                now == last or config.log.samples_every and now % config.log.samples_every == 0
            ):
                with clock("samples"):
                    show = _show_reconstructions if stage == "autoencoder" else _show_drawings
                    show(run, now, prepared, state["params"])
            if on_policy and (
                step == start or (config.log.samples_every and now % config.log.samples_every == 0)
            ):
                _show_rollouts(run, now, prepared, trajectory, profile)
            if now % config.log.every == 0 or now == last:
                values, elapsed = means.take(), time.perf_counter() - window
                values["samples_per_sec"] = (now - shown_at) * config[stage].batch_size / elapsed
                window, shown_at = time.perf_counter(), now
                if "completion_len" in values:
                    values["tokens_per_sec"] = values["samples_per_sec"] * values["completion_len"]
                values |= guard.check()
                run.writer.scalars(now, stage, values)
                health.check(now, values)
                shown = {
                    "loss": "loss",
                    "mse": "mse",
                    "accuracy": "accuracy",
                    "completion_len": "completion_len",
                    "tokens/s": "tokens_per_sec",
                }
                progress.update(
                    now, **{name: values[key] for name, key in shown.items() if key in values}
                )
            stopping, due = stop.reached(), evaluation.is_due(now, last)
            if now == last or stopping or due or now % config.checkpoint.every == 0:
                with clock("checkpoint"):
                    _save(run, checkpoints, now, state, stage, distill_config)
            if stopping:
                raise checkpoint.Stopped
            if due:
                before = time.perf_counter()
                evaluation.during(now, state, distill_config, health)
                window += time.perf_counter() - before  # no part of the steps' time

    checkpoints.wait()
    params = _kept_params(run, state, distill_config)
    if (
        evaluates
        and config.eval.final_split
        and not (start == last and evaluation.is_complete(last))
    ):
        with clock("eval"):
            evaluation.final(last, params, start_step=first)
    stop.promise = "stopping before the next step"
    return params


def _all_spoke(trajectory) -> bool:
    """Whether no completion of the global batch is empty."""
    import jax.numpy as jnp

    return bool(jnp.all(trajectory.mask[:, 0]))


def _kept_params(run, state, distill_config):
    """The weights that a checkpoint offers: to evaluation, to export, and to the next stage and the arms."""
    from opsd_jax import distill

    ema = run.config.checkpoint.params == "ema" and "ema" in state
    return distill.teacher_params(state, distill_config) if ema else state["params"]


def _save(run, checkpoints, step, state, stage, distill_config) -> None:
    checkpoints.save(
        step,
        state,
        _kept_params(run, state, distill_config),
        stage=stage,
        config=run.config,
        digests=run.digests,
    )


class Evaluation:
    """Accuracy while training (`during`) and when a stage ends (`final`), by the code of `opsd_jax.eval`.

    stop: `checkpoint.Flag`, asked before each batch. The step that is evaluated is saved by then.
    """

    def __init__(self, run: Run, stage: str, stop):
        from opsd_jax import eval as eval_lib

        self.run, self.stage, self._stop, self._rows, self._moves = run, stage, stop, {}, {}
        c = run.config.eval
        # Programs that evaluation may add to the training sampler's: for each bucket one a mode, the banned one, the EMA
        # teacher's.
        self.signatures = (len({*c.visual_thoughts, *c.final_visual_thoughts}) + 2) * len(
            run.config.data.buckets.student
        )
        # What cannot be evaluated shows now, not after the last step: a missing split, rows that fit no bucket.
        run.rollout(
            max_new_tokens=c.max_new_tokens or run.config.rollout.max_new_tokens,
            slots=c.slots,
            refill=0,
        )
        fit = functools.partial(
            eval_lib.check_fit, packer=run.packer, task_names=run.config.data.tasks
        )
        if c.every:
            fit(
                self._of(c.split),
                modes={*c.visual_thoughts, run.config.teacher.visual_thoughts},
                limit=c.rows,
                subset_seed=run.config.seed,
            )
        if c.final_split:
            kl = {"none", "real"} if self._measures_kl else set()
            fit(self._of(c.final_split), modes={*c.final_visual_thoughts, *kl}, traces=bool(kl))

    def _of(self, split):
        from opsd_jax import data

        if split not in self._rows:
            self._rows[split] = data.Rows(
                self.run.config, self.run.data_workdir, self.run.tokenizer, split
            )
        return self._rows[split]

    def is_due(self, step, last) -> bool:
        """Whether `during` belongs to a step; the last one of a stage has `final`."""
        every = self.run.config.eval.every
        return self.stage != "autoencoder" and every > 0 and step % every == 0 and step < last

    def is_missing(self, step, history) -> bool:
        """Whether the rows of metrics.jsonl lack the scores of a step; for all processes as the first one finds it."""
        import jax
        import numpy as np

        missing = not any(
            key.startswith("eval/") for row in history if row["step"] == step for key in row
        )
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            missing = bool(multihost_utils.broadcast_one_to_all(np.int32(missing)))
        return missing

    def during(self, step, state, distill_config, health) -> None:
        """Logs {"eval/<task>/<mode>": accuracy} on the validation rows; with an EMA teacher also its own accuracy."""
        from opsd_jax import distill

        c, scores = self.run.config, {}
        self._stop.promise = f"step {step} is saved; stopping after this batch of the evaluation"
        with self.run.clock("eval"):
            for mode in c.eval.visual_thoughts:
                scores |= self._accuracies(state["params"], mode, mode)
            if "ema" in state and self.stage == "opsd":
                scores |= self._accuracies(
                    distill.teacher_params(state, distill_config),
                    c.teacher.visual_thoughts,
                    "teacher",
                )
        logging.info("step %d: %s", step, scores)
        self.run.writer.scalars(step, self.stage, scores)
        health.check(step, scores)

    def _accuracies(self, params, mode, name) -> dict:
        from opsd_jax import eval as eval_lib

        c = self.run.config
        budget = c.eval.max_new_tokens or c.rollout.max_new_tokens
        results = eval_lib.evaluate(
            self._for_sampling(params),
            self._of(c.eval.split),
            self.run.packer,
            task_names=c.data.tasks,
            mode=mode,
            config=self.run.rollout(max_new_tokens=budget, slots=c.eval.slots, refill=0),
            batch_size=c.eval.batch_size,
            limit=c.eval.rows,
            subset_seed=c.seed,
            seed=c.seed,
            mesh=self.run.mesh,
            before_batch=self._stop.check,
        )
        return {f"eval/{r.name}/{name}": r.hits / len(r.predictions) for r in results}

    def _for_sampling(self, params):
        import jax

        from opsd_jax import distill

        places = tuple((x.dtype, x.sharding) for x in jax.tree.leaves(params))
        if places not in self._moves:  # a program each, which is compiled once
            self._moves[places] = distill.for_sampling(
                self.run.mesh, params, self.run.config.model.dtype
            )
        return self._moves[places](params)

    def _modes(self) -> dict[str, tuple]:
        """What the final evaluation measures: {name: (mode, ban_marker)}."""
        c = self.run.config.eval
        modes = {mode: (mode, False) for mode in c.final_visual_thoughts}
        return modes | ({"none-banned": ("none", True)} if c.final_banned else {})

    def _folder(self, step, name) -> str:
        return os.path.join(self.run.workdir, "eval", f"{step:06d}-{name}")

    @property
    def _measures_kl(self) -> bool:
        return self.run.config.eval.kl and self.stage != "warmup"

    def is_complete(self, step) -> bool:
        """Whether all results of `final` are there."""
        names = [*self._modes(), *(["kl"] if self._measures_kl else [])]
        return all(
            os.path.exists(os.path.join(self._folder(step, name), "summary.json")) for name in names
        )

    def final(self, step, params, start_step) -> None:
        """Evaluates the whole final split and writes eval/<step>-<mode>/, exactly as the command `opsd_jax.eval` does.

        Stopped in between, it goes on with the batches that are missing.
        """
        import jax

        from opsd_jax import checkpoint, eval as eval_lib, sharding

        c, run, scores = self.run.config, self.run, {}
        self._stop.promise = f"step {step} is saved; stopping after this batch of the evaluation"
        at = lambda step: os.path.join(run.workdir, "checkpoints", str(step))
        rows = self._of(c.eval.final_split)
        opened = eval_lib.Opened(
            self._for_sampling(params),
            rows,
            run.packer,
            run.marker,
            run.mesh,
            eval_lib.facts_of(params, rows, run.packer, c.data.tasks),
        )
        for name, (mode, ban_marker) in self._modes().items():
            job = eval_lib.prepare(
                run.workdir,
                (mode,),
                checkpoint=at(step),
                benchmarks=(),
                data_dir="",
                protocol="",
                split=c.eval.final_split,
                limit=0,
                ban_marker=ban_marker,
                seed=None,
                name="",
                batch_size=0,
                config=c,
            )
            summary = _answers(
                dataclasses.replace(job, before_batch=self._stop.check), mode, opened
            )
            scores |= {
                f"eval/{task}/{name}": b["overall"]
                for task, b in summary.get("benchmarks", {}).items()
            }
        del opened  # the sampler's copy of the weights
        if self._measures_kl:
            abstract = sharding.abstract(run.mesh, jax.eval_shape(lambda: params))
            start = checkpoint.restore_params(at(start_step), abstract)
            kl = lambda student: eval_lib.reference_kl(
                start,
                student,
                self._of(c.eval.final_split),
                run.packer,
                config=config_lib.model(c),
                task_names=c.data.tasks,
                batch_size=c.eval.batch_size,
                mesh=run.mesh,
                before_batch=self._stop.check,
            )
            before, after = kl(start), kl(params)
            found = {
                task: {
                    "before": before[task]["kl"],
                    "after": after[task]["kl"],
                    "n": after[task]["n"],
                    "closure": 1 - after[task]["kl"] / before[task]["kl"],
                }
                for task in after
            }
            _write_json(
                os.path.join(self._folder(step, "kl"), "summary.json"),
                {
                    "split": c.eval.final_split,
                    "start": at(start_step),
                    "unit": "nats per token",
                    "tasks": found,
                },
            )
            scores |= {
                f"kl/{task}/{k}": v for task, d in found.items() for k, v in d.items() if k != "n"
            }
        eval_lib.write_table(run.workdir)
        run.writer.scalars(step, self.stage, scores)
        logging.info("step %d, %s: %s", step, c.eval.final_split, scores)


def _answers(job, mode, opened) -> dict:
    """The summary of `eval.answer_in_context`. Answers that were begun under other settings of config.eval, which may
    change in between, are dropped."""
    from opsd_jax import answers, eval as eval_lib

    try:
        return eval_lib.answer_in_context(job, mode, opened)
    except answers.Other as error:
        logging.warning("asking all again: %s", error)
        answers.forget(os.path.join(job.workdir, "eval", job.names[mode]))
        return eval_lib.answer_in_context(job, mode, opened)


def _show_batch(run, stage, step, prepared, host_batch) -> None:
    """Pictures and texts of the first rows of the first batch, as the model sees them."""
    from opsd_jax import images

    patch = run.config.model.vit.patch_size
    for n, row in enumerate(prepared[:4]):
        for name, image in (
            ("problem", row.problem),
            *((f"vt{i}", vt) for i, vt in enumerate(row.visual_thoughts)),
        ):
            run.writer.image(
                step, f"{stage}-row{n}-{name}", images.unpatchify(image.patches, image.grid, patch)
            )
    c = getattr(host_batch, "context", None) or host_batch.student
    lines = []
    for n, row in enumerate(prepared[:4]):
        texts = (
            {"context": c}
            if hasattr(host_batch, "context")
            else {"student": host_batch.student, "teacher": host_batch.teacher}
        )
        lines.append(f"== {row.example.pid}: {row.example.question} -> {row.example.answer}")
        lines += [f"{role}: {_context_text(run, x, n)}" for role, x in texts.items()]
    run.writer.text(step, f"{stage}-first-batch", "\n".join(lines))


def _show_reconstructions(run, step, prepared, params) -> None:
    """The pictures of the first rows, and below what the autoencoder makes of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from opsd_jax import flow

    if jax.process_count() > 1:  # a program of one host's pictures would wait for the others
        return
    config = config_lib.model(run.config)
    drawn = config.generation
    for n, row in enumerate(prepared[:4]):
        for m, pixels in enumerate(row.pixels):
            height, width = (side // drawn.stride for side in pixels.shape[:2])
            size = (1, height * drawn.patch, width * drawn.patch, drawn.vae.z_channels)
            sizes = np.array([pixels.shape[:2]])
            latents = flow.encode(
                params, flow.padded(pixels[None], sizes)[0], jnp.zeros(size), config=config
            )
            found = flow.decode(
                params, flow.to_tokens(latents, drawn.patch), grid=(height, width), config=config
            )
            run.writer.image(
                step, f"reconstruction{n}-{m}", np.concatenate([pixels, np.asarray(found[0])])
            )


def _show_drawings(run, step, prepared, params) -> None:
    """For the first rows: the problem, the first visual thought, and what the model draws, side by side; what it wrote."""
    import jax
    import numpy as np

    from opsd_jax import generate, images

    if jax.process_count() > 1:
        return
    model = generate.of_run(run.config, config_lib.model(run.config), params, run.tokenizer)
    model = dataclasses.replace(model, protocol=dataclasses.replace(model.protocol, rounds=2))
    rows, lines = prepared[:4], []
    questions = [
        (
            [
                images.open_rgb(
                    row.example.problem_image, transparency=run.config.images.transparency
                )
            ],
            row.example.question + run.config.prompts.suffix,
        )
        for row in rows
    ]
    traces = generate.reason(
        model, questions, jax.random.key(run.config.seed), draw=True, always=True
    )
    for n, (row, trace) in enumerate(zip(rows, traces)):
        lines.append(f"{row.example.pid}, expected {row.example.answer!r}: " + trace.text)
        pictures = [*row.pixels[:2], trace.pictures[0]]
        canvas = np.full(
            (max(x.shape[0] for x in pictures), sum(x.shape[1] for x in pictures), 3), 255, np.uint8
        )
        left = 0
        for picture in pictures:
            canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1]
        run.writer.image(step, f"drawing{n}", canvas)
    run.writer.text(step, "drawings", "\n".join(lines))


def _context_text(run, c, row) -> str:
    """The packed sequence of a row as text, patches shown as [n patches], latents as [n latents]."""
    import itertools

    import numpy as np

    slots, patches = np.arange(c.length[row]), set(c.patch_slots[row].tolist())
    if c.latents is not None:  # in the order of the sequence
        places = np.where(c.segment[row] > 0, c.latents.order[row], c.slots)
        slots = np.argsort(places, kind="stable")[: c.length[row]]
    kind = lambda slot: (
        "latents" if slot >= c.tokens.shape[1] else "patches" if slot in patches else ""
    )
    parts = []
    for name, group in itertools.groupby(slots.tolist(), kind):
        group = list(group)
        parts += (
            [f"[{len(group)} {name}]"]
            if name
            else [run.tokenizer.decode([c.tokens[row, n]]) for n in group]
        )
    return "".join(parts)


def _show_rollouts(run, step, prepared, trajectory, profile) -> None:
    """What the student wrote for the first rows, with their pictures, and the divergence at each position."""
    import jax

    from opsd_jax import images

    if jax.process_count() > 1:  # rows of other hosts are not here
        return
    for n, row in enumerate(prepared[:4]):
        run.writer.image(
            step,
            f"rollout{n}-problem",
            images.unpatchify(
                row.problem.patches, row.problem.grid, run.config.model.vit.patch_size
            ),
        )
    run.writer.text(
        step,
        "jsd-by-position",
        "\n".join(f"{n:5d}  {x:.6f}" for n, x in enumerate(jax.device_get(profile))),
    )
    tokens, mask, skips = jax.device_get((trajectory.tokens, trajectory.mask, trajectory.num_skips))
    run.writer.text(
        step,
        "rollouts",
        "\n".join(
            f"{row.example.pid} ({skips[n]} skips), expected {row.example.answer!r}: {run.tokenizer.decode(tokens[n][mask[n]])}"
            for n, row in enumerate(prepared[:8])
        ),
    )


def _write_json(path, value) -> None:
    from opsd_jax import metrics

    metrics.write_text(path, json.dumps(value, indent=1))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
