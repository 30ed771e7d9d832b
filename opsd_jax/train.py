"""A training run, from the first stage to the report of its control arms.

  python -m opsd_jax.train --config=configs/mini.py --workdir=W

  settings -> session -> for each stage: (start or resume -> loop -> evaluation) -> control arms

A run is a sequence of stages (`autoencoder`, `warmup`, `opsd`, `sft`, `offline`; their table is in
run/stage_table.py). Step numbers continue from stage to stage. If W holds a run, that run is
continued exactly from where it stopped. `--arm=NAME` runs one of the config's control arms in
W/arms/NAME, from the weights with which W's first OPSD step began.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_flags, sharding
from opsd_jax.data import sizes
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.batches import Batches
from opsd_jax.data.examples import Examples
from opsd_jax.inputs import checks, cli, json_files
from opsd_jax.run import (
    controls,
    report_table,
    run_page,
    samples,
    saves,
    screening,
    stage_table,
    start,
    step_inputs,
    teacher_cache,
)
from opsd_jax.run import scores as scores_lib
from opsd_jax.run import session as session_lib
from opsd_jax.run import state as state_lib
from opsd_jax.run.checks import check, check_privileged, images_caution
from opsd_jax.run.scores import Scores
from opsd_jax.run.session import Session
from opsd_jax.run.stage import Stage
from opsd_jax.run.stage_evaluation import Evaluation
from opsd_jax.run.stage_log import StageLog
from opsd_jax.runtime import allocator, distributed, files, locks, run_folder
from opsd_jax.runtime import clock as clock_lib
from opsd_jax.runtime import metrics as metrics_lib
from opsd_jax.runtime.checkpoint import Checkpoints
from opsd_jax.runtime.clock import CompileGuard
from opsd_jax.runtime.distributed import EXIT_STOPPED
from opsd_jax.runtime.health import UnhealthyRunError
from opsd_jax.runtime.progress import Progress
from opsd_jax.runtime.stopping import Stopped, StopRequest, install_sigterm

flags.DEFINE_string("workdir", None, "folder of the run; a run that it holds is continued")
flags.DEFINE_string("arm", "", "run this control arm, from the warm-up of the run in --workdir")


def main(argv) -> None:
    """The command: one run and then its control arms, or one arm.

    What is wrong with settings, files or data, or with the run's health, ends it with one line;
    --verbosity=1 adds the traceback.
    """
    cli.start()
    config_flags.log_plainly()
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if config is None:
        sys.exit("error: --config is missing: give a file of settings, --config=configs/mini.py")
    if workdir is None:
        sys.exit("error: --workdir is missing: give --workdir=FOLDER, where the run is kept")
    try:
        _run_command(config, workdir, flags.FLAGS.arm)
    except (ValueError, OSError, UnhealthyRunError, controls.ArmsFailedError) as error:
        if distributed.peer_is_lost(error):
            raise
        logging.debug("where the error comes from:", exc_info=error)
        distributed.end_with_error(error)


def _run_command(config: ConfigDict, workdir: str, arm: str) -> None:
    allocator.share_one_arena()  # before JAX starts its threads
    of_arm = controls.settings_of(config, workdir, arm) if arm else None
    check(config, workdir)
    several, on_cpu = distributed.initialize(), jax.default_backend() == "cpu"
    if on_cpu:
        allocator.keep_freed_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # arms and continued runs compile the same
        jax.config.update("jax_compilation_cache_dir", run_folder.compiled_programs(workdir))
    if of_arm:
        arm_config, arm_workdir = of_arm
        train(arm_config, arm_workdir, data_workdir=workdir)
        _print_times(arm_workdir)
        return
    if not several:
        # With several, JAX handles SIGTERM, and a handler set here would replace its own.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)  # while it trains, `train` handles them
    beside = on_cpu and not several
    failed = (_train_with_arms_beside if beside else _train_and_then_arms)(config, workdir)
    _print_times(workdir)
    if jax.process_index() == 0:
        command = shlex.join(["python", "-m", "opsd_jax.train", *sys.argv[1:]])
        arms = [name for name in config.run_arms if name not in failed]
        scores, page = _write_report(config, workdir, arms, command)
        if scores:
            print(report_table.in_terminal(scores, arms, config, workdir))
            for line in report_table.other_arms(workdir, config.run_arms):
                print(line)
        print(f"the page of the run: {page}")
    if failed:
        raise controls.ArmsFailedError(failed, config.run_arms)


def _train_with_arms_beside(config: ConfigDict, workdir: str) -> dict[str, str]:
    """Trains a run, and its control arms in processes that run beside it and after it.

    Returns {name: where its log is} of arms that failed.
    """
    steps = {
        name: max(config_lib.stage_ends(config_lib.arm(config, name)).values())
        for name in config.run_arms
    }
    with controls.Arms(steps, workdir, sys.argv[1:]) as arms:
        _train_alone(config, workdir, workdir, arms.start)
        return arms.finish()


def _train_and_then_arms(config: ConfigDict, workdir: str) -> dict[str, str]:
    """Trains a run and then its control arms in this process, which holds the devices.

    An accelerator belongs to one process, so that arms cannot be processes of their own there.

    Returns {name: why} of arms that failed.
    """
    # Of several processes, one alone may fail, and the others would wait for it. What makes a run
    # unhealthy is the same on all.
    alone = (ValueError, OSError, jax.errors.JaxRuntimeError)
    caught = (UnhealthyRunError, *(alone if jax.process_count() == 1 else ()))
    _train_alone(config, workdir, workdir, _do_nothing)
    failed = {}
    for name in config.run_arms:
        logging.info("arm %s: starts", name)
        try:
            arm_config, arm_workdir = controls.settings_of(config, workdir, name)
            train(arm_config, arm_workdir, data_workdir=workdir)
        except caught as error:
            logging.debug("where the error of arm %s comes from:", name, exc_info=error)
            failed[name] = str(error)
    return failed


def train_run(config: ConfigDict, workdir: str | os.PathLike[str]) -> Session:
    """Trains a run and its control arms, writes its table and page, and opens it.

    A run that the folder holds is continued. Arms follow one after another, in this process, which
    is the only one. Compiled programs are kept where JAX_COMPILATION_CACHE_DIR says, if it is set.

    Args:
      config: the settings, see `opsd_jax.read_config`.
      workdir: folder of the run.
    Returns:
      The run, as `opsd_jax.open_run` opens it.
    Raises:
      controls.ArmsFailedError: the run is done, but arms failed. Its table and page are written,
        without these arms.
      Further errors are those of `train`.
    """
    checks.instance("config", config, ConfigDict, "read it first, opsd_jax.read_config(FILE)")
    checks.path("workdir", workdir)
    workdir = os.fspath(workdir)
    check(config, workdir)
    failed = _train_and_then_arms(config, workdir)
    arms = [name for name in config.run_arms if name not in failed]
    settings = run_folder.config(workdir)
    call = f"opsd_jax.train_run(opsd_jax.read_config({settings!r}), {workdir!r})"
    _write_report(config, workdir, arms, call)
    if failed:
        raise controls.ArmsFailedError(failed, config.run_arms)
    return session_lib.open_run(workdir)


def _write_report(
    config: ConfigDict, workdir: str, arms: Sequence[str], command: str
) -> tuple[dict[str, Scores], str]:
    """Writes table and page of a finished run.

    arms: its control arms that are done. command: what trained the run, for the page.

    Returns (the scores in the table, {} of a run without one; the path of the page).
    """
    scores = {}
    if "opsd" in config.stages and config.eval.final_split:
        scores = scores_lib.collect(workdir, arms)
        report_table.write(workdir, scores, arms)
    page = run_page.write(workdir, scores, arms, command)
    run_page.caution_pages(workdir)
    return scores, page


def _print_times(workdir: str) -> None:
    """Says where the time of a finished run went."""
    if jax.process_index() == 0:
        times = json_files.read(run_folder.time(workdir), fix="delete it")
        print(f"{workdir}: where the time went\n{clock_lib.table(times)}")


def _keep_times(run: Session, continued: bool) -> None:
    """Adds the seconds of this command to W/time.json.

    A command that trained and evaluated nothing leaves it as it is.

    continued: whether there are times of earlier commands of this run.
    """
    path, times = run_folder.time(run.workdir), run.clock.report()
    earlier = {}
    if continued and os.path.exists(path):
        if not {"update", "eval"} & times.keys():
            return
        earlier = json_files.read(path, fix="delete it")
    primary = jax.process_index() == 0
    files.write_json(path, clock_lib.added(times, earlier), primary=primary)


def _stop(number, frame) -> None:
    """Ends the command while it does not train; arms that run save and stop first (`Arms`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C aborts at once
    name = signal.Signals(number).name
    print(
        f"{name}: stopping, and arms that run with it; the same command continues",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(EXIT_STOPPED)


def _do_nothing() -> None:
    pass


def train(
    config: ConfigDict,
    workdir: str,
    *,
    data_workdir: str = "",
    start_arms: Callable[[], None] = _do_nothing,
):
    """Checks the settings, runs or continues a run, and returns its final weights.

    Args:
      data_workdir: folder of the run whose data and tokenizer are used where the settings name
        none; "" for workdir.
      start_arms: called after the first step of the OPSD stage; the checkpoint that it starts
        from is complete by then.
    Raises:
      Stopped: the process was asked to stop; what it did is saved.
      UnhealthyRunError: the run learns nothing, or breaks.
      ValueError, OSError: settings, data or files are wrong.
    """
    check(config, workdir, data_workdir)
    return _train_alone(config, workdir, data_workdir or workdir, start_arms)


def _train_alone(
    config: ConfigDict, workdir: str, data_workdir: str, start_arms: Callable[[], None]
):
    """`train`, of settings that were checked: a run or an arm, without the arms of a run."""
    primary = jax.process_index() == 0
    with (
        locks.only_writer(workdir, inside=True, primary=primary),
        config_flags.also_logging_to(run_folder.log(workdir, jax.process_index())),
        install_sigterm() as stop,
        Checkpoints(
            run_folder.checkpoints(workdir),
            keep_latest=config.checkpoint.keep_latest,
            keep_steps=saves.never_deleted(config),
            timeout=config.checkpoint.timeout,
        ) as checkpoints,
    ):
        run, done = session_lib.open_training(config, workdir, data_workdir, checkpoints)
        with run.writer, _reporting_a_stop(run, done is not None, checkpoints):
            # With stages warmup (0..350] and opsd (350..750]: at step 350, warmup has no step left,
            # is evaluated if that is missing, and opsd starts from its weights. At step 500, warmup
            # is skipped, and opsd continues with the state of step 500.
            params, continued = None, done is not None
            if not continued:
                with run.clock("data"):
                    sizes.check_training(config, run.data_dir, run.packer)
                    check_privileged(config, functools.partial(_examples_of, run, data_workdir))
                    if caution := images_caution(config, _examples_of(run, data_workdir, config)):
                        logging.warning("%s", caution)
            for stage in stage_table.of_run(run):
                if done is None or done <= stage.last:
                    then = start_arms if stage.kind.starts_arms else _do_nothing
                    params = train_stage(run, stage, done, params, checkpoints, stop, then)
                    done = stage.last
                    stop.check()
            _keep_times(run, continued)
    return params


def _examples_of(run: Session, data_workdir: str, config: ConfigDict) -> Examples:
    """The training examples of a run under its settings, or under those of one of its arms."""
    data_dir = workdir_lib.data_dir(config, data_workdir)
    opened = dataclasses.replace(run, config=config, data_dir=data_dir)
    return opened.examples("train", asked_by="training")


@contextlib.contextmanager
def _reporting_a_stop(run: Session, continued: bool, checkpoints: Checkpoints) -> Iterator[None]:
    """Says how a run that is asked to stop continues, once its last checkpoint is complete.

    continued: see `_keep_times`.
    """
    try:
        yield
    except Stopped:
        checkpoints.wait()  # if the last save fails, this was not a clean stop
        _keep_times(run, continued)
        print(f"stopped as asked; the same command continues {run.workdir}")
        raise


def train_stage(
    run: Session,
    stage: Stage,
    done: int | None,
    params,
    checkpoints: Checkpoints,
    stop: StopRequest,
    start_arms: Callable[[], None],
):
    """Takes the steps of one stage that are left, with an optimizer and a schedule of its own.

    Where it begins:

      done                     params  begins at    with
      None                     None    stage.first  initial weights: a new run
      stage.first              given   stage.first  the weights of the stage before
      stage.first              None    stage.first  those of the checkpoint between two stages
      between first and last   None    done         the state in the checkpoint
      stage.last               None    stage.last   no step left: a missing evaluation, if any

    Args:
      done: step of the run's latest checkpoint; None if there is none.
      params: the weights that the stage before returned; None if this process has trained none.
      start_arms: called once the checkpoint of the weights that the stage starts from is complete,
        and the stage's programs are compiled (if it has a step left).
    Returns:
      The weights of its last checkpoint (the EMA if the settings say so).
    Raises:
      Stopped: `stop` was set. It is asked between steps and between the batches of an evaluation;
        what was done by then is saved.
    """
    config, kind, clock = run.config, stage.kind, run.clock
    begin = stage.first if done is None else max(done, stage.first)
    if params is None and begin == stage.first:
        params = start.initial_params(run, done)
    if begin < stage.last:
        what = stage_table.about(config, stage.name)
        logging.info("%s, steps %d to %d: %s", stage.name, begin + 1, stage.last, what)

    # Data first: what is wrong with them shows before anything is saved.
    batches, stream = _data_of(run, stage, begin, params, stop)
    evaluation = Evaluation(run, stage, stop)
    state = _state_of(run, stage, begin, params, checkpoints, is_new=done is None)
    health, history = config_lib.health(config, stage.name), _history(run, stage, begin)
    health.replay(history)
    if begin > stage.first and evaluation.is_due(begin) and evaluation.is_missing(begin, history):
        evaluation.during(begin, state, health)  # the run was stopped while it evaluated

    guard = CompileGuard()
    update = sharding.update_program(kind.step, state, stage.config)
    update = guard.watch("update", update, batches.schedule.num_buckets)
    sampler = kind.sampler(run, batches, guard)
    log = StageLog(run, stage, begin, guard, health)
    name, primary = os.path.basename(os.path.normpath(run.workdir)), jax.process_index() == 0
    stop.check()
    if begin == stage.last:
        start_arms()
    else:
        logging.info("%s: compiling its programs, then the first step", stage.name)
    with (
        Progress(stage.last, name, stage.name, start=begin, primary=primary) as progress,
        run.profile,
    ):
        for step in run.profile.steps(begin, stage.last):
            stop.promise = "saving after this step, then stopping"
            with clock("data"):
                inputs = step_inputs.put_on_mesh(run.mesh, next(stream))
            inputs = sampler(state["params"], step, inputs)
            if step == begin:
                logging.debug("%s, first batch:\n%s", stage.name, step_inputs.shapes(inputs))
            with clock("update"):
                state, measured = update(state, inputs.batch, *inputs.sampled)
                jax.block_until_ready(state["step"])
            now = step + 1
            if step == begin:
                start_arms()  # its processes find the programs that this step compiled
            log.add(measured | inputs.metrics)
            samples.write(
                run,
                kind.samples,
                samples.FinishedStep(stage, begin, now, inputs, measured, state["params"]),
            )
            if now % config.log.every == 0 or now == stage.last:
                log.write(now, progress)

            stopping, evaluating = stop.reached(), evaluation.is_due(now)
            if stopping or saves.saves_at(config, kind, stage.last, now):
                with clock("checkpoint"):
                    state_lib.save(run, stage, checkpoints, now, state)
            if stopping:
                raise Stopped
            if evaluating:
                with log.paused():
                    evaluation.during(now, state, health)

    checkpoints.wait()
    params = state_lib.offered_params(run, stage, state)
    if evaluation.is_final_due(is_new=begin < stage.last):
        with clock("eval"):
            evaluation.final(params)
    stop.promise = "stopping before the next step"
    return params


def _state_of(
    run: Session, stage: Stage, begin: int, params, checkpoints: Checkpoints, *, is_new: bool
) -> dict:
    """The state in which a stage takes its next step: that of a checkpoint, or a fresh one.

    The weights that a new run starts from are saved, where something needs them later.

    params: the weights that the stage starts from; None where it is continued.
    """
    if begin > stage.first:
        return state_lib.restored(run, stage, checkpoints, begin)
    state = state_lib.fresh(run, stage, params)
    if is_new and saves.saves_start(run.config, stage.kind):
        with run.clock("checkpoint"):
            state_lib.save(run, stage, checkpoints, begin, state, weights_only=True)
            checkpoints.wait()
    return state


def _history(run: Session, stage: Stage, begin: int) -> list[dict]:
    """What the run logged of the stage up to a step; [] where the stage starts there."""
    if begin == stage.first:
        return []
    records = metrics_lib.read(run_folder.metrics(run.workdir))
    return [record for record in records if record["stage"] == stage.name]


def _data_of(
    run: Session, stage: Stage, begin: int, params, stop: StopRequest
) -> tuple[Batches, Iterator]:
    """The batches of a stage, and an iterator over those of the steps from `begin` on.

    Where the stage needs it, the examples are screened first, or a teacher is cached.

    params: the weights that the stage starts from; None where it is continued.
    """
    config, kind, clock = run.config, stage.kind, run.clock
    examples = run.examples(
        "train", generation=kind.generates, asked_by="training", stage=stage.name
    )
    share = sharding.local_batch_indices(run.mesh, stage.batches.size)
    with clock("data"):
        batches = Batches(stage.batches, run.workdir, examples, run.packer, share=share)
    if begin == stage.last:
        return batches, iter(())
    if stage.name in config_lib.screened_stages(config):
        with clock("screen"):
            kept = screening.kept_rows(run, stage, batches, params, before_batch=stop.check)
        batches = batches.only(kept)
    load = kind.load
    if kind.caches_teacher:
        with clock("collect"):  # before the optimizer takes its memory
            if params is None:
                params = start.read(run, saves.origin(config, run.workdir, stage.name))
            cache = teacher_cache.collect(run, params, examples, before_batch=stop.check)
        load = functools.partial(load, cache=cache)
    return batches, batches.stream(load, begin, stage.last)


if __name__ == "__main__":
    app.run(main, flags_parser=config_flags.parse_flags)
