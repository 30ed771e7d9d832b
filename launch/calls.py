"""Commands of other programs, with a limit of time, for tpu_vm.py and gke.py."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


class LaunchError(Exception):
    """What the user has to change or to know."""


FAILED, INTERRUPTED = 1, 130  # exit codes
_OF_ONE_PROCESS = re.compile(r"\bopsd(_jax\.| )(convert|data|generate|plan|redraw|study)\b")


def ended(command: Callable[[Sequence[str]], int], words: Sequence[str], interrupted: str) -> int:
    """Exit code of a command of these words. What is wrong is said in one line.

    interrupted: what goes on after Ctrl-C, and how it can be ended.
    """
    try:
        return command(words)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        return INTERRUPTED


def number(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    """A variable that is a whole number; LaunchError names it if it is none, or is too small."""
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise LaunchError(f"{name}={text}: give a whole number, at least {least}")
    return int(text)


def refuse_on_several_hosts(words: Sequence[str], hosts: int, instead: str) -> None:
    """Raises LaunchError if this command would do the same, or write the same files, on each host.

    instead: how a command of one process is started.
    """
    match = _OF_ONE_PROCESS.search(" ".join(words))
    if hosts == 1 or not match:
        return
    if match[2] == "study":
        raise LaunchError(
            f"{match[0]} starts its commands on one machine, and here are {hosts} hosts: take a "
            "slice of one host, such as v5p-8, or start what `study --list` prints, command by "
            "command (docs/guides/study.md)"
        )
    raise LaunchError(f"{match[0]} is a command of one process: {instead}")


@dataclasses.dataclass(frozen=True)
class Answer:
    """Exit code of a command, and what it printed, if that was captured."""

    code: int
    out: str = ""
    err: str = ""


def answers(
    commands: Sequence[Sequence[str]],
    *,
    capture: bool,
    limit_s: float | None,
    given: str | None = None,
    interactive: bool = False,
) -> list[Answer]:
    """Runs commands at the same time and waits for all.

    Args:
      capture: their output is returned, and else printed.
      limit_s: a command that takes longer is killed with all that it started, such as ssh, which
        would else keep its output open. None for no limit: only then may ssh ask for a passphrase.
      given: what each reads from its input, which needs a limit.
      interactive: they read what the user types. Others read nothing: ssh would take the lines that
        were pasted after its own, which the shell has not read yet.
    Raises:
      LaunchError: a program is not installed.
    """
    pipe = subprocess.PIPE if capture else None
    source = None if interactive else subprocess.DEVNULL
    processes: list[subprocess.Popen] = []
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=source if given is None else subprocess.PIPE,
                    stdout=pipe,
                    stderr=pipe,
                    text=True,
                    start_new_session=limit_s is not None,
                )
            )
        end = None if limit_s is None else time.monotonic() + limit_s
        return [_answer(process, end, given) for process in processes]
    except FileNotFoundError as error:
        raise LaunchError(
            f"{error.filename} is not installed: https://cloud.google.com/sdk"
        ) from None
    finally:
        for process in processes:
            if process.poll() is None:  # Ctrl-C, which reaches no other session
                _kill(process)


def _answer(process: subprocess.Popen, end: float | None, given: str | None) -> Answer:
    try:
        left = None if end is None else max(end - time.monotonic(), 0)
        out, err = process.communicate(given, timeout=left)
        return Answer(process.returncode, out or "", err or "")
    except subprocess.TimeoutExpired:
        _kill(process)
        command = shlex.join(process.args)
        return Answer(process.returncode, err=f"killed, as it did not end in time: {command}\n")


def _kill(process: subprocess.Popen) -> None:
    """Kills a process, and all that it started if it leads a session."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()
