"""A run, top to bottom: `python -m opsd_jax.train --config=configs/mini.py --workdir=W`.

  settings -> data -> mesh -> model -> for each stage: (restore or start) -> loop -> checkpoint, evaluation -> arms

A run is a sequence of stages (`autoencoder`, `warmup`, `opsd`, `sft`, `offline`); step numbers go on from stage to
stage. If W holds a run, it continues where that stopped, exactly. `--arm=NAME` runs one of the config's control arms
in W/arms/NAME, from the weights with which W's first OPSD step began.
"""

import contextlib
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from opsd_jax import config as config_lib
from opsd_jax import config_check, distill, offline, optimizer, rollout, sharding, supervised
from opsd_jax.data import batches as batches_lib
from opsd_jax.data import examples, procedural
from opsd_jax.inputs import cli as cli_lib
from opsd_jax.inputs import paths
from opsd_jax.model import bagel
from opsd_jax.release import folders
from opsd_jax.run import cli, samples, session, teacher_cache
from opsd_jax.run import controls as controls_lib
from opsd_jax.run import evaluation as evaluation_lib
from opsd_jax.run import start as start_lib
from opsd_jax.runtime import checkpoint, distributed, files, locks, metrics
from opsd_jax.runtime import clock as clock_lib
from opsd_jax.runtime import health as health_lib
from opsd_jax.runtime import progress as progress_lib
from opsd_jax.runtime import stopping as stopping_lib
from opsd_jax.runtime.distributed import EXIT_STOPPED

flags.DEFINE_string("workdir", None, "Folder of the run; continues the run that it holds.")
flags.DEFINE_string(
    "arm", "", "Run this arm of the config, from the warm-up of the run in --workdir."
)


def main(argv) -> None:
    """The command: one run and then its arms, or one arm. What is wrong with settings, files or data, or with the run's
    health, is told in one line; --verbosity=1 adds where in the code."""
    cli_lib.start()
    # Orbax and TFDS tell much; a run's terminal shows what this package says, and warnings.
    logging.get_absl_handler().addFilter(
        lambda record: "opsd_jax" in record.pathname or record.levelno >= 30
    )
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if workdir is None or config is None:
        raise app.UsageError("give --config=configs/mini.py and --workdir=FOLDER")
    try:
        _run(config, workdir, flags.FLAGS.arm)
    except (ValueError, OSError, health_lib.UnhealthyRunError, controls_lib.ArmsFailed) as error:
        if distributed.peer_is_lost(error):
            raise
        logging.debug("where the error comes from:", exc_info=error)
        distributed.end_with_error(error)


def _run(config, workdir: str, arm: str) -> None:
    check(config, workdir)
    several = distributed.initialize()
    if several and config.run_arms and not arm:
        raise ValueError(
            "several processes cannot start arms: add --config.run_arms='()', and run each arm by a "
            "command of its own, with --arm=NAME, when this run is done"
        )

    if not os.environ.get(
        "JAX_COMPILATION_CACHE_DIR"
    ):  # arms compile the same programs, and so does a continued run
        jax.config.update(
            "jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), "xla_cache")
        )
    if arm:
        train(*controls_lib.settings_of(config, workdir, arm), data_workdir=workdir)
        return
    if (
        not several
    ):  # JAX tells all processes of a SIGTERM to one; a handler set here would replace its own
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)  # while training, `train` handles them
    with controls_lib.Arms(config.run_arms, workdir, sys.argv[1:]) as controls:
        train(config, workdir, on_warm=controls.start)
        controls.finish()
    if config.run_arms:
        print(controls_lib.report(workdir, config.run_arms))


def _stop(number, frame) -> None:
    """Ends the command where it does not train itself; arms that run save and stop first (`arms.Arms`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C again aborts at once
    print(
        f"{signal.Signals(number).name}: stopping, and arms that run with it; the same command continues",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(EXIT_STOPPED)


def check(config, workdir: str, data_workdir: str = "") -> None:
    """ValueError or FileNotFoundError for what would fail later, in the run or in an arm that it starts; nothing is made.

    data_workdir: as in `train`.
    """
    cli_lib.check_precision()
    paths.check_given("--workdir", workdir, orbax=True)
    config_check.check(config)
    _check_there(config, workdir, data_workdir or workdir)
    for name in config.run_arms:
        try:
            _check_there(config_lib.arm(config, name), os.path.join(workdir, "arms", name), workdir)
        except (ValueError, OSError) as error:
            raise ValueError(f"config.arms.{name}: {error}") from None


def _check_there(config, workdir: str, data_workdir: str) -> None:
    """What a run reads is there: its data or how to make them, a tokenizer, and what it starts from."""
    if config.init_from and not folders.is_released(
        config.init_from
    ):  # before what is looked for at any path
        paths.check("config.init_from", config.init_from, orbax=True)
    procedural.check_there(config, data_workdir)
    if (
        config.init_from
        and not folders.is_model(config.init_from)
        and not checkpoint.is_begun(workdir)
    ):
        try:
            checkpoint.resolve(config.init_from)
        except checkpoint.CheckpointNotFoundError as error:
            raise checkpoint.CheckpointNotFoundError(
                f"config.init_from={config.init_from!r} is no model and holds no checkpoint: {error}"
            ) from None


def train(config, workdir: str, *, data_workdir: str = "", on_warm=lambda: None):
    """Runs (or continues) a run and returns its final parameters.

    on_warm: called when the checkpoint is there that the OPSD stage starts from.
    data_workdir: whose data and tokenizer are used where the config names none.
    """

    check(config, workdir, data_workdir)
    ends = config_lib.stage_ends(config)
    lock = locks.only_writer(workdir, inside=True, primary=jax.process_index() == 0)
    with (
        lock,
        stopping_lib.install_sigterm() as stop,
        checkpoint.Checkpoints(
            os.path.join(workdir, "checkpoints"),
            keep_latest=config.checkpoint.keep_latest,
            keep_steps=[0, *ends.values()],
        ) as checkpoints,
    ):
        session.record_config(config, workdir)
        done, saved = checkpoints.latest(), None
        if done is not None:
            saved = checkpoints.metadata(done)
            config_check.check_unchanged(saved["config"], config)
            logging.info("continuing %s at step %d (%s)", workdir, done, saved["stage"])
        run = session.open_training(
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
                        params = start_lib.initial_params(run, done)
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
            files.write_json(
                os.path.join(workdir, "time.json"),
                run.clock.report(),
                primary=jax.process_index() == 0,
            )
    return params


@contextlib.contextmanager
def _said_when_stopped(workdir, checkpoints):
    """Says how a run that is asked to stop goes on, once its last checkpoint is complete."""
    try:
        yield
    except stopping_lib.Stopped:
        checkpoints.wait()  # a save that fails is no stop as asked
        print(f"stopped as asked; the same command continues {workdir}")
        raise


def train_stage(
    run: session.Session,
    stage: str,
    first: int,
    last: int,
    params,
    checkpoints,
    done,
    stop,
    on_start,
):
    """Steps first + 1 .. last of a run: one stage with its own optimizer and schedule. Returns the parameters to go
    on from, those of its last checkpoint.

    params: the weights to start from; not used where a checkpoint of this stage is continued. on_start: called when
    the checkpoint of those weights is complete. Raises Stopped where `stop` is set, between steps or batches of an
    evaluation; what was done by then is saved.
    """

    config, clock = run.config, run.clock
    stage_config = config_lib.stage_config(config, stage, run.tokenizer)
    rollout_config = run.sampling()
    on_policy, draws = stage == "opsd", config_lib.draws(config, stage)

    # data first: what is wrong with them shows before anything is saved
    rows = examples.Examples.open(
        config, run.data_workdir, run.tokenizer, "train", generation=draws
    )
    make_batches = teacher_cache.Batches if stage == "offline" else batches_lib.Batches
    batches = make_batches(
        config,
        run.workdir,
        stage,
        rows,
        run.packer,
        share=sharding.local_batch_indices(run.mesh, config[stage].batch_size),
    )
    evaluation, evaluates = evaluation_lib.Evaluation(run, stage, stop), stage != "autoencoder"

    if stage == "offline" and (done is None or done < last):
        with clock(
            "collect"
        ):  # in the middle of the stage the teacher is read again, before the optimizer takes its room
            batches.cache = teacher_cache.collect(
                start_lib.initial_params(run, first) if params is None else params,
                config,
                run.workdir,
                rows,
                run.packer,
                run.mesh,
                before_batch=stop.check,
            )

    # state: fresh from the parameters, or as the checkpoint left it
    make_state = lambda p: optimizer.init_state(p, stage_config)
    if done is not None and first < done:
        abstract = jax.eval_shape(
            lambda: make_state(bagel.init(jax.random.key(0), config=stage_config.model))
        )
        with clock("checkpoint"):
            state = checkpoints.restore(done, sharding.abstract(run.mesh, abstract))
        start = done
    else:
        shardings = sharding.tree_shardings(run.mesh, jax.eval_shape(make_state, params))
        state = jax.jit(make_state, out_shardings=shardings)(params)
        start = first
        # where arms, the KL and diagnostics start from
        if stage in ("opsd", "sft", "offline") and checkpoints.latest() is None:
            _save(run, checkpoints, start, state, stage, stage_config)
            checkpoints.wait()
    on_start()

    stream = batches.stream(start, last) if start < last else iter(())
    buckets = batches.schedule.num_buckets
    health = health_lib.Health(**config.health)
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
            evaluation.during(start, state, stage_config, health)
    means, window, shown_at = metrics.Means(), time.perf_counter(), start
    for_sampling = on_policy and rollout.relayout_program(
        run.mesh, state["params"], config.model.dtype
    )
    sample_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    guard = clock_lib.CompileGuard()
    step_of = {
        "autoencoder": supervised.autoencoder_step,
        "opsd": distill.update_step,
        "offline": offline.step,
    }
    update = sharding.update_program(
        step_of.get(stage, supervised.image_generation_step if draws else supervised.sft_step),
        state,
        stage_config,
    )
    draw_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    update = guard.watch("update", update, buckets)
    if not draws:  # image-generation stages do not sample
        sample = guard.watch("sample", rollout.sample, buckets)

    stop.check()
    with progress_lib.Progress(
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
                    trajectory = sample(rollout_params, batch.student, key, config=rollout_config)
                    attempt = 0
                    while attempt < config.rollout.empty_retries and not _all_spoke(trajectory):
                        attempt += 1
                        host_batch, prepared = batches.opsd(step, attempt)
                        batch = sharding.put_batch(run.mesh, host_batch)
                        trajectory = sample(
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
                samples.show_batch(
                    run, stage, now, prepared, getattr(host_batch, "traces", host_batch)
                )
            if draws and (
                now == last or config.log.samples_every and now % config.log.samples_every == 0
            ):
                with clock("samples"):
                    show = (
                        samples.show_reconstructions
                        if stage == "autoencoder"
                        else samples.show_drawings
                    )
                    show(run, now, prepared, state["params"])
            if on_policy and (
                step == start or (config.log.samples_every and now % config.log.samples_every == 0)
            ):
                samples.show_rollouts(run, now, prepared, trajectory, profile)
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
                    _save(run, checkpoints, now, state, stage, stage_config)
            if stopping:
                raise stopping_lib.Stopped
            if due:
                before = time.perf_counter()
                evaluation.during(now, state, stage_config, health)
                window += time.perf_counter() - before  # no part of the steps' time

    checkpoints.wait()
    params = _kept_params(run, state, stage_config)
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
    return bool(jnp.all(trajectory.mask[:, 0]))


def _kept_params(run, state, stage_config):
    """The weights that a checkpoint offers: to evaluation, to export, and to the next stage and the arms."""
    ema = run.config.checkpoint.params == "ema" and "ema" in state
    return distill.teacher_params(state, stage_config) if ema else state["params"]


def _save(run, checkpoints, step, state, stage, stage_config) -> None:
    checkpoints.save(
        step,
        state,
        _kept_params(run, state, stage_config),
        stage=stage,
        config=config_lib.to_json(run.config),
        digests=run.digests,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
