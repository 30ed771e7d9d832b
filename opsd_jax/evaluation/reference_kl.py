"""KL of the teacher to the student on the text traces of the data."""

import numpy as np

from opsd_jax import context as context_lib
from opsd_jax import distill, sharding
from opsd_jax.evaluation import contexts


def reference_kl(
    teacher,
    student,
    rows,
    packer,
    *,
    config,
    task_names,
    batch_size: int,
    limit: int = 0,
    subset_seed: int = 0,
    mesh=None,
    before_batch=lambda: None,
) -> dict:
    """KL(teacher with the true visual thoughts || student without) on the rows' text traces, nats per token.

    Paper Eq. 4 on fixed completions: mean over the tokens of a trace, then over rows. config: ModelConfig.
    before_batch: as in `evaluate`.
    Returns {task: {"kl", "n"}}.
    """
    found = {}
    ends = {"bos": packer.tokenizer.bos, "eos": packer.tokenizer.eos}
    for source, name in enumerate(task_names):
        values = {}
        chosen = contexts.chosen_numbers(rows, source, limit, subset_seed)
        for bucket, numbers in contexts.by_length(
            rows, packer, source, chosen, batch_size, ("none", "real")
        ):
            before_batch()
            mine = contexts.own_part(numbers, mesh)
            prepared, c_t = contexts.contexts(rows, packer, source, mine, "real", 0, bucket)
            tokens, mask = packer.references(prepared)
            batch = context_lib.Batch(packer.student(prepared, bucket), c_t)
            batch, tokens, mask, placed = contexts.put_on_mesh(
                mesh, (batch, tokens, mask, np.asarray(mine, np.int32))
            )
            completion = context_lib.completion(tokens, mask, **ends)
            kl = distill.kl_to_student(teacher, student, batch, completion, config=config)
            kl, counted, placed = sharding.gather_to_host((kl, completion.mask, placed))
            values |= zip(placed.tolist(), ((kl * counted).sum(1) / counted.sum(1)).tolist())
        found[name] = {"kl": float(np.mean(list(values.values()))), "n": len(values)}
    return found
