"""KL of the teacher to the student on the text traces of the data."""

import numpy as np

from opsd_jax import context as context_lib
from opsd_jax import distill, sharding
from opsd_jax.evaluation import contexts, inference
from opsd_jax.model.config import ModelConfig
from opsd_jax.runtime.stopping import BeforeBatch, never_stop


def reference_kl(
    teacher: dict,
    student: dict,
    selection: contexts.Selection,
    *,
    config: ModelConfig,
    before_batch: BeforeBatch = never_stop,
) -> dict[str, dict]:
    """KL(teacher with the true visual thoughts || student without), nats per token of text traces.

    Paper Eq. 4 on fixed completions: mean over the tokens of a trace, then over examples.

    Args:
      teacher, student: parameters, laid out for scoring.
      selection: the examples. before_batch: as in `inference.answer`.
    Returns:
      {task: {"kl", "n": number of examples}}.
    """
    values = {task: {} for task in selection.tasks}
    tokenizer, packer = selection.packer.tokenizer, selection.packer
    tasks = contexts.benchmarks(selection, ("none", "real"))
    for task, keys in inference.batches(tasks, selection.batch_size):
        before_batch()
        source, bucket = selection.tasks.index(task.name), max(map(task.size, keys))
        local = selection.local(inference.filled(keys, selection.batch_size))
        prepared, with_thoughts = selection.packed(source, local, "real", bucket)
        host_batch = (
            context_lib.Batch(packer.student(prepared, bucket), with_thoughts),
            *packer.references(prepared),
            np.asarray(local, np.int32),
        )
        batch, tokens, mask, placed = selection.put(host_batch)
        completion = context_lib.completion(tokens, mask, bos=tokenizer.bos, eos=tokenizer.eos)
        kl = distill.kl_to_student(teacher, student, batch, completion, config=config)
        kl, counted, placed = sharding.gather_to_host((kl, completion.mask, placed))
        means = (kl * counted).sum(1) / counted.sum(1)
        values[task.name] |= zip(placed.tolist(), means.tolist())
    return {
        task: {"kl": float(np.mean(list(found.values()))), "n": len(found)}
        for task, found in values.items()
    }
