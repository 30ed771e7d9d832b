"""A benchmark as the evaluation loop sees it: questions by key, and a rule that scores the answers.

of_examples   prepared examples of a task: images and a question; the rule of the task scores
of_table      a public table (`tables`): images and prompts; the rules of the public harness score
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from PIL import Image

from opsd_jax import tags, tasks
from opsd_jax.data import randomness
from opsd_jax.data.examples import Examples
from opsd_jax.data.schema import Example
from opsd_jax.evaluation import prompts, statistics, table_scores, tables
from opsd_jax.inputs import checks
from opsd_jax.tasks import maze

Key = int | str


def _no_size(key: Key) -> int:
    return 0


def _key_alone(key: Key) -> tuple[str, str]:
    return "", str(key)


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """What is asked, and how answers are scored.

    The loop and the report page know no more than this.

    Attributes:
      name: name of the benchmark.
      keys: keys of its examples, in order: numbers of a task's examples, or indices of a table.
      question: key -> (Pillow RGB images, text, or texts around them), see `interleave.Question`.
      expected: key -> the right answer.
      judge: {key: text} -> ({key: what its line in predictions.jsonl gets besides, with "hit"},
        what the summary gets: overall, unit, n, categories, interval_95 and more; None where the
        share of hits is the score).
      size: key -> number by which examples of similar size share a batch: the number of images of a
        table's question, the bucket of a task's example.
      identify: key -> what tells the example from all others in any results: (pid, answer), or
        (MD5 of the table, index).
      table: the public table, None for a task.
      rule: how answers are judged, as a sentence for readers.
      subset: see `randomness.subset_facts`; None where all examples are asked.
      left_out: keys that are not asked, because they cannot be shown or scored.
      without_visual_thoughts: number of examples that have none, in a mode that shows them or
        something instead.
    """

    name: str
    keys: tuple[Key, ...]
    question: Callable[[Key], tuple[list[Image.Image], str | tuple[str, ...]]]
    expected: Callable[[Key], str]
    judge: Callable[[dict[Key, str]], tuple[dict[Key, dict], dict | None]]
    size: Callable[[Key], int] = _no_size
    identify: Callable[[Key], tuple[str, Hashable]] = _key_alone
    table: tables.Table | None = None
    rule: str = ""
    subset: dict | None = None
    left_out: tuple[Key, ...] = ()
    without_visual_thoughts: int | None = None

    def text(self, key: Key) -> str:
        """The text of a question, with a mark at the place of each image between its parts."""
        text = self.question(key)[1]
        return text if isinstance(text, str) else f" {tags.PLACE} ".join(text).strip()

    def without(self, keys: Iterable[Key]) -> "Benchmark":
        """The same benchmark with some of its keys left out."""
        out = set(keys)
        return dataclasses.replace(
            self,
            keys=tuple(key for key in self.keys if key not in out),
            left_out=tuple(key for key in self.keys if key in out),
        )


class Score(NamedTuple):
    """How a text answers a question.

    Attributes:
      answer: what the text gives as its answer; None where it has none.
      right: whether that is the expected answer, or another one that the task accepts.
    """

    answer: str | None
    right: bool


def score(example: Example, text: str) -> Score:
    """Judges the answer in a text, by the rule of a procedural task, or word for word.

    Raises TypeError for other arguments, such as an `interleave.Answer` in the place of its text.
    """
    first = "give an example of a run, opsd_jax.open_run(W).examples('test')[0]"
    checks.instance("example", example, Example, first)
    checks.instance("text", text, str, "give the text of an answer, answer.text")
    return Score(*tasks.judge(example.metadata, tags.wrap_answer(example.answer), text))


def of_examples(examples: Examples, source: int, *, limit: int = 0, seed: int = 0) -> Benchmark:
    """The prepared examples of a task as a benchmark.

    Args:
      source: number of the task among those of `examples`.
      limit: size of a random subset chosen by `seed`; 0 for all examples.
    Raises:
      ValueError: the stored answer of an example matches no completion.
    """
    stored = examples.sources[source]
    keys = tuple(randomness.subset(len(stored), limit, seed))
    examples.check_references(source, keys)

    def question(key):
        return examples.preprocess.question(stored[key])

    def expected(key):
        return stored[key].answer

    def judge(texts):
        found = {}
        for key, text in texts.items():
            answer, hit = score(stored[key], text)
            found[key] = {"pid": stored[key].pid, "answer": answer, "hit": hit}
        return found, None

    def identify(key):
        return stored[key].pid, stored[key].answer

    facts = randomness.subset_facts(len(keys), len(stored), seed)
    name = examples.tasks[source]
    rule = tasks.rule(stored[keys[0]].metadata) if keys else ""
    return Benchmark(
        name, keys, question, expected, judge, identify=identify, rule=rule, subset=facts
    )


_HARNESS_RULE = (
    "The rules of the public harness decide; an answer that they cannot read counts as a miss."
)


def of_table(
    table: tables.Table, *, cache: str, limit: int = 0, seed: int = 0, in_chat: bool = False
) -> Benchmark:
    """A public table as a benchmark.

    Args:
      cache: see `prompts.images`. limit, seed: see `tables.subset`.
      in_chat: whether images are where the prompt has them, as in a conversation. Otherwise they
        come first, with the marks of the harness's wrapper in the text.
    """
    part = tables.subset(table, limit, seed)
    rows = {row.index: row for row in part.rows}

    def question(key):
        parts = prompts.messages(rows[key])
        text: str | tuple[str, ...]
        text, places = prompts.wrapper(parts)
        if in_chat:
            text, places = prompts.conversation(parts)
        shown = prompts.images(rows[key], cache=cache)
        return [shown[place] for place in places], text

    def expected(key):
        cells = rows[key].cells
        return str(cells["maze_map"] if table.kind == "vsp" else cells["answer"])

    def judge(texts):
        # The whole table is scored, not the part: MMVP's pairs follow from the rows' places in it.
        scores = table_scores.score(table, texts, partial=True)
        found = {
            row["index"]: {k: v for k, v in row.items() if k != "index"} for row in scores.rows
        }
        return found, {
            "overall": scores.overall,
            "unit": scores.unit,
            "n": sum(n for _, n in scores.parts),
            "categories": scores.per_category,
            "interval_95": list(statistics.wilson_of_mean(scores.parts)),
            "extras": scores.extras,
            "needs_judge": sum(bool(row.get("needs_judge")) for row in found.values()),
            "without_main_row": len(tables.questions(part) & set(scores.orphans)),
            "md5": table.md5,
            "without_image": list(table.dropped),
            **({"respelt_answers": table.respelt} if table.respelt else {}),
        }

    def size(key):
        return len(prompts.wrapper(prompts.messages(rows[key]))[1])

    def identify(key):
        return table.md5, str(key)

    return Benchmark(
        table.name,
        tuple(rows),
        question,
        expected,
        judge,
        size,
        identify,
        part,
        f"{_HARNESS_RULE} {maze.RULE}" if table.kind == "vsp" else _HARNESS_RULE,
        randomness.subset_facts(tables.size(part), tables.size(table), seed),
    )


def broken(benchmark: Benchmark) -> dict[Key, str]:
    """{key: what is wrong} of examples that cannot be shown, or that no answer can match.

    Reads all images once.
    """
    found = table_scores.unmatchable(benchmark.table) if benchmark.table else {}
    for key in benchmark.keys:
        try:
            benchmark.question(key)
        except ValueError as error:
            found[key] = str(error)
    return found
