"""Settings from a file: FILE.py, FILE.py:PRESET, or FILE.json as a run writes it."""

import glob
import importlib.util
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.inputs import checks, json_files, paths


def read(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """The settings in a file, with changes.

        read_config("configs/mini.py:smoke", {"opsd.steps": 10, "run_arms": ()})

    A change may also add a control arm, with the settings that it changes:

        {"arms.far": {"teacher": {"blocks": ("image", "question")}}, "run_arms": ("far",)}

    Args:
      path: a Python file with a function get_config(), and after a colon what it is called with; or
        a run's W/config.json.
      changes: {name of a setting, such as "opsd.steps" or "arms.far.opsd.steps": its value}.
    Raises:
      ValueError, OSError: there is no such file, what it does goes wrong (the message names the
        line), a change is unknown or has a wrong value, or the settings contradict each other after
        the changes. Those of a file alone are checked when the run starts.
      TypeError: `path` is no path, or `changes` no dict.
    """
    checks.instance("path", path, (str, os.PathLike), "give a file, such as 'configs/mini.py'")
    fix = 'give a dict, such as {"opsd.steps": 10}'
    checks.instance("changes", {} if changes is None else changes, Mapping, fix)
    config = of_file(os.fspath(path))
    for key, value in (changes or {}).items():
        checks.instance("a key of changes", key, str, fix)
        _change(config, key, value)
    if changes:  # a file alone may be incomplete
        config_check.check(config)
    return config.lock()


def of_file(path: str) -> ConfigDict:
    """The settings in a file, see `read`, without changes and locked."""
    # "FILE.py:" is read as an address elsewhere; `_of_python` says what it lacks.
    paths.check_given("--config", path.removesuffix(":") if path.endswith(".py:") else path)
    return (_of_json(path) if path.endswith(".json") else _of_python(path)).lock()


def _change(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a setting, or what an arm changes, in place."""
    *groups, name = path = key.split(".")
    if groups[:1] == ["arms"]:
        with config.unlocked(), config.ignore_type():  # what an arm held may be an int for a float
            _change_arm(config, path[1:], value)
        return
    group = config
    for part in groups:
        group = group.get(part) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or name not in group:
        raise ValueError(config_check.unknown(key))
    if isinstance(group[name], ConfigDict):
        if isinstance(value, (Mapping, ConfigDict)) and value:
            for inner, one in value.items():
                _change(config, f"{key}.{inner}", one)
            return
        inside = [f"{key}.{setting}" for setting in group[name]] or [f"{key}.NAME"]
        raise ValueError(f"{key} is a group of settings: change {' or '.join(inside[:3])}")
    config_check.check_value(value, key, key)
    group[name] = _typed(key, value)


def _change_arm(config: ConfigDict, path: Sequence[str], value: Any) -> None:
    """Sets one setting of an arm, adding the arm if it is new; of a dict each, in place.

    path: the arm, then the groups and the setting, or some of them with a dict as value.
    """
    arm, *inside = path
    if isinstance(value, (Mapping, ConfigDict)):
        if not inside:
            config.arms[arm] = ConfigDict()
        for key, one in value.items():
            _change_arm(config, [*path, *str(key).split(".")], one)
        return

    def grouped(setting):
        for part in reversed(inside):
            setting = {part: setting}
        return setting

    config_check.check_arm(arm, ConfigDict(grouped(value)) if inside else value)
    config.arms.update({arm: grouped(_typed(".".join(inside), value))})


def _typed(key: str, value: Any) -> Any:
    """A value that was checked, of its setting's own type: ml_collections takes no NumPy scalar."""
    return type(config_lib.settings()[key].default)(value)


def _of_python(path: str) -> ConfigDict:
    """What get_config() of a Python file returns. path: FILE.py or FILE.py:ARGUMENT."""
    file, colon, argument = path.partition(":")
    if colon and not argument:
        raise ValueError(
            f"--config={path} ends with a colon: name a preset after it, or leave it out"
        )
    spec = importlib.util.spec_from_file_location("config_file", file)
    if not os.path.isfile(file) or spec is None or spec.loader is None:
        fault = "not a Python file" if os.path.isfile(file) else "there is no such Python file"
        raise ValueError(
            f"{file}: {fault}: give one with get_config(), such as "
            f"configs/mini.py{_similar_file(file)}"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        config = make(*[argument] if argument else []) if make else None
    except Exception as error:  # whatever the file does
        said = str(error).partition("\n")[0]
        lines: list[int | None] = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == spec.origin
        ]
        if isinstance(error, SyntaxError) and error.filename == spec.origin:
            lines = [error.lineno]
        if not isinstance(error, (ValueError, OSError)):
            said = f"{type(error).__name__}: {said}"
        where = f"{file}, line {lines[-1]}: " if lines else f"{file}: "
        # An error about the argument names the file and the argument itself.
        raise ValueError(said if said.startswith(path) else where + said) from error
    if make is None:
        raise ValueError(
            f"{file}: it has no function get_config(), which returns the settings; see "
            "configs/mini.py"
        )
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{file}: get_config() returned {config!r:.40}: return the ConfigDict of "
            "opsd_jax.config.default(), with changed values"
        )
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
    if fault := config_check.wrong_value(record):
        raise ValueError(f"{path}: {fault}")
    return config_lib.from_json(record)
