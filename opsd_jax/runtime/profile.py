"""A trace of some steps of a run, for XProf and TensorBoard: what hosts and devices did, and when.

Both read the folder that the run writes:

W/profile/plugins/profile/<first>-<last>/<host>.xplane.pb      steps <first> to <last>
                                         <host>.trace.json.gz  the same, for viewers of such files

Each process writes what its own host and devices did; one of several puts its number before the
host. A trace begins and ends within a stage: steps of two stages are two traces.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Sequence

import jax
from absl import logging

_PLACE = ("plugins", "profile")  # where the viewers look for folders of traces


class Profile:
    """Traces the steps of a run that are asked for; a context manager around steps of a stage.

        with profile:
            for step in profile.steps(0, 350):
                ...

    Leaving the context, also by an exception, ends the step and writes the trace that is open. A
    trace that cannot be written is a warning: the run is worth more.

    Args:
      folder: where traces are written, W/profile.
      steps: first and last step that is traced, counted from 1 over all stages; () for none.
      done: the step that the run continues from; None if it starts. A line says which of the steps
        are not traced because of that.
    """

    def __init__(self, folder: str, steps: Sequence[int], done: int | None = None):
        self._folder, self._primary = folder, jax.process_index() == 0
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._began: int | None = None  # first step of the trace that is open
        self._latest = 0
        self._mark: jax.profiler.StepTraceAnnotation | None = None  # of the step that goes on
        if done is not None and done in self._steps[:-1]:
            self._say("steps up to %d are done: the trace begins with the next", done)
        elif done is not None and self._steps and done >= self._steps[-1]:
            self._say("step %d is done: nothing is traced; name later steps for a trace", done)

    def steps(self, begin: int, end: int) -> Iterator[int]:
        """`range(begin, end)`, the steps done before each step; that to `begin + 1` is the first.

        Only for use within the context.
        """
        for done in range(begin, end):
            self._next(done + 1)
            yield done

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        self._end_step()
        if self._began is not None:
            self._write(self._began)

    def _next(self, step: int) -> None:
        """Ends the step before, if one goes on, and begins this one."""
        self._end_step()
        if step in self._steps:
            if self._began is None:
                shutil.rmtree(self._unfinished, ignore_errors=True)  # of a process that was killed
                jax.profiler.start_trace(self._unfinished, profiler_options=_options())
                self._began = step
            self._latest = step
            self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._mark.__enter__()
        elif self._began is not None:
            self._write(self._began)

    def _end_step(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _write(self, first: int) -> None:
        """Ends the trace that is open, from step `first` to the latest, and writes its files."""
        self._began = None
        last = self._latest
        target = os.path.join(self._folder, *_PLACE, f"{first:06d}-{last:06d}")
        # Processes of one host would write the same file.
        number = f"process{jax.process_index()}-" if jax.process_count() > 1 else ""
        try:
            jax.profiler.stop_trace()
            os.makedirs(target, exist_ok=True)
            pattern = os.path.join(glob.escape(self._unfinished), *_PLACE, "*", "*")
            for path in glob.glob(pattern):
                os.replace(path, os.path.join(target, number + os.path.basename(path)))
        except (OSError, jax.errors.JaxRuntimeError) as error:
            self._steps = range(0)
            logging.warning("the trace of steps %d to %d is not written: %s", first, last, error)
        else:
            self._say("steps %d to %d are traced: xprof --logdir=%s", first, last, self._folder)
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    @property
    def _unfinished(self) -> str:
        return os.path.join(self._folder, f"process{jax.process_index()}.tmp")

    def _say(self, message: str, *values) -> None:
        if self._primary:
            logging.info(f"config.log.profile_steps: {message}", *values)


def _options() -> jax.profiler.ProfileOptions:
    """What is recorded: all but the calls of Python functions.

    They would be most of a trace (98 % of the events of a tiny run) and make the steps slower.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options
