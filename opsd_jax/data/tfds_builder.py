"""The released data set as a TFDS builder class, for those who prepare data with TFDS itself.

    from opsd_jax.data.tfds_builder import VisualOpsd
    builder = VisualOpsd(config="chart_refocus", data_dir=TARGET, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=SOURCE))

It holds a split in memory, and above 1000 MiB a split TFDS asks for TensorFlow. `prepare.prepare`
writes the same folder with neither limit, continues after an interruption, and can leave bad rows
out. `Config` names further columns, and allows several problem images in a row, or none:

    VisualOpsd(config=tfds_builder.Config(name="chart_refocus", columns=("text:solution",)), ...)

Importing this module registers the data set's name with TFDS.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from opsd_jax.data import schema, source_files

TASKS = ("Visual_Search", "Spatial_Navigation", "Jigsaw_Assembly", "Chart_Refocus")  # as released


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    """A task, by its name in lower case.

    columns: further columns to keep, "text:COLUMN" or "images:COLUMN".
    several_images: whether a row may have several problem images. optional_image: whether it may
      have none.
    """

    columns: tuple[str, ...] = ()
    several_images: bool = False
    optional_image: bool = False

    def __post_init__(self):
        schema.check_columns("columns", self.columns)


class VisualOpsd(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder: one configuration per released task.

    Preparing raises BadSourceError and BadRowError.
    """

    VERSION = tfds.core.Version(schema.VERSION)
    RELEASE_NOTES = {schema.VERSION: "First release."}
    BUILDER_CONFIGS = [Config(name=task.lower(), description=task) for task in TASKS]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put <Task>/data/<split>-*.parquet or .jsonl into manual_dir."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=schema.DESCRIPTION,
            disable_shuffling=True,
            features=schema.features(
                self.builder_config.columns,
                self.builder_config.several_images,
                self.builder_config.optional_image,
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        folders = source_files.task_folders(dl_manager.manual_dir)
        task = next((task for task in folders if task.lower() == self.builder_config.name), None)
        if task is None:
            raise schema.BadSourceError(
                f"{dl_manager.manual_dir} has no {self.builder_config.description}, "
                f"only {', '.join(folders)}: move the folder there"
            )
        files, _ = source_files.split_files(folders[task])
        return {split: self._generate_examples(task, paths) for split, paths in files.items()}

    def _generate_examples(self, task: str, paths: list[Path]) -> Iterator[tuple[int, dict]]:
        examples = (
            example
            for path in paths
            for example in source_files.read_examples(
                path, task=task, further=self.builder_config.columns
            )
        )
        for key, example in enumerate(examples):
            yield (
                key,
                schema.to_features(
                    example, self.builder_config.several_images, self.builder_config.optional_image
                ),
            )
