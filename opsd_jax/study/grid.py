"""The grid of a study: its settings, and the runs and arms that they name."""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check, config_flags
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import wording
from opsd_jax.evaluation.wording import Words
from opsd_jax.inputs import checks
from opsd_jax.run import stage_evaluation, stage_table
from opsd_jax.runtime import files, run_folder

OPSD = "opsd"  # the name of a run's own OPSD stage among the arms
_OF_ALL = ("eval.final_split", "data.dir", "data.tasks")  # else answers could not be compared


class InOrder(ConfigDict):
    """A ConfigDict whose keys keep the order in which they were set; others sort them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"sort_keys": False, **kwargs})


def default() -> ConfigDict:
    """The settings of a study, which config files change.

    base: FILE or FILE:ARGUMENT of the settings that all runs share, as --config of a run.
    changes: changed settings of all runs, nested as in a run's `arms`.
    seeds: seeds of the runs; each has a warm-up of its own.
    groups: {name: changed settings of its runs}; they may change the warm-up.
    base_of: {group: its base}; a group that is not named has `base`.
    arms: {name: changed settings of a control arm}, as `arms` of a run.
    arms_of: {group: names of its arms}; a group that is not named has all.
    reference: the arm that others are compared with; "opsd" is the run's own OPSD stage.
    questions: {title: {group: names of arms}}, a table for each; {} for one table of all. The rows
      of the reference and of the start are in all of them.
    parallel: number of jobs at a time; 0 for what cores or devices allow, see `slots`.
    """
    return InOrder(
        {
            "base": "",
            "changes": InOrder(),
            "seeds": (0,),
            "groups": InOrder({"all": InOrder()}),
            "base_of": InOrder(),
            "arms": InOrder(),
            "arms_of": InOrder(),
            "reference": OPSD,
            "questions": InOrder(),
            "parallel": 0,
        }
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One command of a study: a run up to its OPSD stage's end, or one of its control arms.

    Attributes:
      group, seed: of the run.
      arm: name of the arm; `OPSD` for the run itself.
      config: the job's own settings.
      settings: file of the run's settings. run: folder of the run.
    """

    group: str
    seed: int
    arm: str
    config: ConfigDict
    settings: str
    run: str

    @property
    def name(self) -> str:
        arm = "" if self.is_run else f" {self.arm}"
        return f"{self.group} seed {self.seed}{arm}"

    @property
    def is_run(self) -> bool:
        return self.arm == OPSD

    @property
    def workdir(self) -> str:
        return self.run if self.is_run else run_folder.arm(self.run, self.arm)

    @property
    def log(self) -> str:
        """File of what the command prints."""
        return os.path.join(self.workdir, "log.txt")

    @property
    def last(self) -> int:
        """The job's last step, as it counts them."""
        return max(config_lib.stage_ends(self.config).values())

    @property
    def start(self) -> int:
        """Step of the run after which OPSD and all arms start."""
        return config_lib.start_of(self.config, "opsd") if self.is_run else 0

    def command(self) -> list[str]:
        """The ordinary training command."""
        found = [sys.executable, "-m", "opsd_jax.train", f"--config={self.settings}"]
        found += [f"--workdir={self.run}"]
        return found if self.is_run else [*found, f"--arm={self.arm}"]

    def is_done(self) -> bool:
        """Whether the final evaluation is complete."""
        kind = stage_table.kind_of(self.config, self.config.stages[-1])
        return not stage_evaluation.missing_results(self.config, self.workdir, kind, self.last)


@dataclasses.dataclass(frozen=True)
class Question:
    """One table of a study.

    Attributes:
      title: its heading; "" for the only table of a study.
      arms: {group: its arms in the table, the reference included}.
    """

    title: str
    arms: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A study whose settings were checked.

    Attributes:
      workdir: its folder, an absolute path.
      jobs: by group, then seed; a run comes before its arms.
      reference: arm that others are compared with. parallel: see `default`.
      questions: its tables, at least one.
    """

    workdir: str
    jobs: tuple[Job, ...]
    reference: str
    parallel: int
    questions: tuple[Question, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(job.group for job in self.jobs))

    def arms(self, group: str) -> tuple[str, ...]:
        """Arms of a group; the first is `OPSD`."""
        return tuple(dict.fromkeys(job.arm for job in self.jobs if job.group == group))

    def seeds(self, group: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(job.seed for job in self.jobs if job.group == group))

    @property
    def words(self) -> Words:
        """What tables and pages call the privileged content of the runs."""
        runs = [job.config for job in self.jobs if job.is_run]
        return wording.of_runs(map(config_lib.block_names, runs))

    def run_of(self, job: Job) -> Job:
        """The run that an arm starts from."""
        return next(other for other in self.jobs if other.run == job.run and other.is_run)


def read(given: ConfigDict, workdir: str, overrides: Sequence[str] = ()) -> Study:
    """The study of a configuration. Nothing is written.

    Args:
      workdir: its folder; it need not exist.
      overrides: --config.KEY=VALUE, settings of all runs, which count more than `changes`.
    Raises:
      ValueError: settings that no study or no run can have, with group and arm.
      ConfigMismatchError: a run exists with other settings.
    """
    _check(given)
    workdir = os.path.abspath(workdir)
    jobs: list[Job] = []
    for group in given.groups:
        names = _arms_of(given, group)
        base = config_flags.read([f"--config={given.base_of.get(group, given.base)}", *overrides])
        changes = [given.changes, _overridden(base, overrides), given.groups[group]]
        config = _changed(f"group {group}", base, changes)
        for name in names:
            config.arms[name] = ConfigDict(given.arms[name].to_dict())
        for seed in given.seeds:
            of_seed = config.copy_and_resolve_references()
            of_seed.seed = seed
            jobs += _jobs(group, of_seed, os.path.join(workdir, "runs", group), names)
        _check_arms(group, config)
    for job in jobs:
        _check_same(job)
    return Study(workdir, tuple(jobs), given.reference, given.parallel, _questions(given))


def write_settings(study: Study) -> None:
    """Writes the settings of all runs; a file that has them already is left alone."""
    for job in study.jobs:
        if job.is_run:
            files.write_json(job.settings, config_lib.to_json(job.config))


def _arms_of(given: ConfigDict, group: str) -> tuple[str, ...]:
    """Names of a group's control arms."""
    return tuple(given.arms_of.get(group, tuple(given.arms)))


def _questions(given: ConfigDict) -> tuple[Question, ...]:
    """The tables of a study."""
    if not given.questions:
        return (Question("", {group: (OPSD, *_arms_of(given, group)) for group in given.groups}),)
    return tuple(
        Question(
            title,
            {
                group: tuple(dict.fromkeys((given.reference, *parts[group])))
                for group in given.groups
                if group in parts
            },
        )
        for title, parts in given.questions.items()
    )


def _jobs(group: str, config: ConfigDict, folder: str, names: Sequence[str]) -> list[Job]:
    """The jobs of one run. names: its control arms, in order."""
    run = os.path.join(folder, f"seed{config.seed}")
    arms = {OPSD: config}
    start = run_folder.checkpoint(run, config_lib.start_of(config, "opsd"))
    arms |= {name: config_lib.arm(config, name, start) for name in names}
    return [Job(group, config.seed, arm, c, f"{run}.json", run) for arm, c in arms.items()]


def _changed(whose: str, base: ConfigDict, changes: Sequence[ConfigDict]) -> ConfigDict:
    """A copy of the settings with changes and without arms, checked."""
    config = base.copy_and_resolve_references().unlock()
    try:
        for part in changes:
            config.update(part.to_dict())
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{whose}: {error}") from error
    config.run_arms, config.arms = (), ConfigDict()
    try:
        config_check.check(config)
        if "opsd" not in config.stages:
            raise ValueError(
                f"config.stages is {config.stages}, without the stage opsd, where arms start"
            )
        if not config.eval.final_split or "none" not in config.eval.final_visual_thoughts:
            raise ValueError(
                f"config.eval.final_split is {config.eval.final_split!r} and "
                f"config.eval.final_visual_thoughts {config.eval.final_visual_thoughts}: a study "
                "compares answers without visual thoughts on a split: name it, with "
                "--config.changes.eval.final_split=SPLIT, and 'none' among the modes"
            )
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from None
    return config


def _overridden(base: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The settings that overrides name, nested, with the values that they have in `base`."""
    found: dict = {}
    for argument in overrides:
        key = argument.partition("=")[0].lstrip("-").removeprefix("noconfig.")
        *groups, name = key.removeprefix("config.").split(".")
        source, target = base, found
        for group in groups:
            source, target = source[group], target.setdefault(group, {})
        target[name] = source[name]
    return ConfigDict(found)


def _check(given: ConfigDict) -> None:
    """Checks the study's own settings."""
    usual = default()
    if "stages" in given:
        raise ValueError(
            "--config names a file of a run's settings: give that as --config.base, beside "
            "--config=configs/study.py:content"
        )
    for key in given:
        if key not in usual:
            raise ValueError(f"config.{key}: a study has no such setting, only {', '.join(usual)}")
    for key in usual:
        if key not in given:
            raise ValueError(f"config.{key} is missing: start from opsd_jax.study.grid.default()")
    if not given.base or not isinstance(given.base, str):
        raise ValueError("config.base is empty: name the file of a run, such as configs/mini.py")
    if not given.seeds:
        raise ValueError("config.seeds is empty: name at least one")
    for seed in given.seeds:
        checks.number("config.seeds", seed, int, checks.SEED)
    checks.once("config.seeds", given.seeds)
    checks.number("config.parallel", given.parallel, int, "[0, inf)")
    if not given.groups:
        raise ValueError("config.groups is empty: name one, without changes for the base's runs")
    for key in ("groups", "arms"):
        for name, changes in given[key].items():
            checks.folder_name(f"config.{key}.{name}", name)
            if not isinstance(changes, ConfigDict):
                raise ValueError(
                    f"config.{key}.{name} is {changes!r}: give changed settings, nested"
                )
    if OPSD in given.arms:
        raise ValueError(f"config.arms.{OPSD}: that is the name of the run's own OPSD stage")
    for group in given.base_of:
        checks.choice("config.base_of", group, tuple(given.groups))
    for group, names in given.arms_of.items():
        checks.choice("config.arms_of", group, tuple(given.groups))
        checks.names(f"config.arms_of.{group}", names, tuple(given.arms))
        checks.once(f"config.arms_of.{group}", names)
    for group in given.groups:
        arms = (OPSD, *_arms_of(given, group))
        checks.choice(f"config.reference, of group {group},", given.reference, arms)
    for title, parts in given.questions.items():
        shown = f"config.questions[{title!r}]"
        if not isinstance(parts, ConfigDict):
            raise ValueError(f"{shown} is {parts!r}: give {{group: names of arms}}")
        for group, names in parts.items():
            checks.choice(shown, group, tuple(given.groups))
            checks.names(f"{shown}[{group!r}]", names, (OPSD, *_arms_of(given, group)))


def _check_arms(group: str, config: ConfigDict) -> None:
    """Checks the arms of a group as those of a run that starts them itself."""
    checked = config.copy_and_resolve_references()
    checked.run_arms = tuple(config.arms)
    try:
        config_check.check(checked)
    except ValueError as error:
        raise ValueError(f"group {group}: {error}") from None
    for name in config.arms:
        arm = config_lib.arm(config, name)
        for key in _OF_ALL:
            section, part = key.split(".")
            if arm[section][part] != config[section][part]:
                raise ValueError(
                    f"arm {name} changes {key}: its answers could not be compared with those of "
                    "other arms. Make a group with this change instead"
                )


def _check_same(job: Job) -> None:
    """Raises ConfigMismatchError where the job began under other settings."""
    if not os.path.exists(run_folder.config(job.workdir)):
        return
    if not workdir_lib.has_logged(job.workdir):
        return
    free = (*config_check.FREE_SETTINGS, *(() if job.is_run else ("init_from",)))
    saved: Mapping = workdir_lib.read_record(job.workdir)
    try:
        config_check.check_unchanged(saved, config_lib.to_json(job.config), free=free)
    except config_check.ConfigMismatchError as error:
        raise config_check.ConfigMismatchError(
            f"{job.workdir} exists, but {error} A study takes further seeds, groups and arms, and "
            "other settings under another name"
        ) from None
