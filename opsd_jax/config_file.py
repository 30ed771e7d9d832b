"""Settings from a file: FILE.py, FILE.py:PRESET, or FILE.json as a run writes it."""

import glob
import importlib.util
import os
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.inputs import checks, json_files, paths


def read(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """The settings in a file, with changes.

        read_config("configs/mini.py:smoke", {"opsd.steps": 10, "run_arms": ()})

    Args:
      path: a Python file with a function get_config(), and after a colon what it is called with; or
        a run's W/config.json.
      changes: {name of a setting, such as "opsd.steps": its value}.
    Raises:
      ValueError, OSError: there is no such file, what it does goes wrong (the message names the
        line), or a change is unknown or has a value of another type.
      TypeError: `path` is no path.
    """
    checks.instance("path", path, (str, os.PathLike), "give a file, such as 'configs/mini.py'")
    path = os.fspath(path)
    # "FILE.py:" is read as an address elsewhere; `_of_python` says what it lacks.
    paths.check_given("--config", path.removesuffix(":") if path.endswith(".py:") else path)
    config = (_of_json if path.endswith(".json") else _of_python)(path).lock()
    for key, value in (changes or {}).items():
        _change(config, key, value)
    return config


def _change(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a setting, in place."""
    *groups, name = key.split(".")
    group = config
    for part in groups:
        group = group.get(part) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or name not in group:
        raise ValueError(config_check.unknown(key))
    if isinstance(group[name], ConfigDict):
        inside = [f"{key}.{setting}" for setting in group[name]]
        raise ValueError(f"{key} is a group of settings: change {' or '.join(inside[:3])}")
    if isinstance(group[name], tuple) and isinstance(value, str):
        raise ValueError(f"{key}={value!r}: give a tuple, {(value,)!r}")
    try:
        group[name] = value
    except TypeError as error:
        given, needed = type(value).__name__, type(group[name]).__name__
        raise ValueError(
            f"{key}={value!r} is of type {given}: give one of type {needed}"
        ) from error


def _of_python(path: str) -> ConfigDict:
    """What get_config() of a Python file returns. path: FILE.py or FILE.py:ARGUMENT."""
    file, colon, argument = path.partition(":")
    if colon and not argument:
        raise ValueError(
            f"--config={path} ends with a colon: name a preset after it, or leave it out"
        )
    spec = importlib.util.spec_from_file_location("config_file", file)
    try:
        if not os.path.isfile(file) or spec is None or spec.loader is None:
            raise ValueError(
                "there is no such Python file: give one with get_config(), such as "
                f"configs/mini.py{_similar_file(file)}"
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
        lines: list[int | None] = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == origin
        ]
        if isinstance(error, SyntaxError) and error.filename == origin:
            lines = [error.lineno]
        if not isinstance(error, (ValueError, OSError)):
            said = f"{type(error).__name__}: {said}"
        where = f"{file}, line {lines[-1]}: " if lines else f"{file}: "
        raise ValueError(said if said.startswith(path) else where + said) from error
    return config


def _similar_file(path: str) -> str:
    """ "; did you mean 'configs/mini.py'?", of the files beside `path` and in configs/; or ""."""
    folders = dict.fromkeys((os.path.dirname(path), "configs"))
    there = [file for folder in folders for file in glob.glob(os.path.join(folder, "*.py"))]
    names = {os.path.basename(file): file for file in reversed(there)}
    close = names.get(checks.closest(os.path.basename(path), names))
    return f"; did you mean {close!r}?" if close else ""


def _of_json(path: str) -> ConfigDict:
    """The settings in a JSON file."""
    record = json_files.read(path, "give a run's config.json, or a Python file", fix="repair it")
    if unknown := _unknown_key(record, config_lib.default()):
        raise ValueError(f"{path}: {config_check.unknown(unknown)}")
    try:
        return config_lib.from_json(record)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} holds a setting of another type: {error}") from error


def _unknown_key(record: Mapping, known: ConfigDict, prefix: str = "") -> str:
    """The first key of a record that is no setting; "" if there is none."""
    for name, value in record.items():
        if name not in known:
            return prefix + name
        if isinstance(value, Mapping) and isinstance(known[name], ConfigDict) and name != "arms":
            if found := _unknown_key(value, known[name], f"{prefix}{name}."):
                return found
    return ""
