"""What the files in configs/ share: a size and a slice by name, and contexts by name."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from opsd_jax.inputs import checks

# Slice: (its chips, mesh.tensor where the heads allow it, sequences of a batch that a chip of fsdp
# takes at a time); for models of up to 8B parameters.
SLICES = {"v5p-8": (4, 1, 4), "v6e-16": (16, 4, 1), "v5e-16": (16, 4, 1)}

ASKED = ("system", "image", "question")  # what the student sees in the paper
SOLUTION = "text:full_text_only_thought"
# {name: (blocks of the student, blocks of the teacher)}
CONTEXTS = {
    "opsd_text": (ASKED, (*ASKED, "intro", SOLUTION, "transition")),
    "crop": (ASKED, (*ASKED, "intro", "image@crop", "transition")),
    "degraded": (("system", "image@low_resolution", "question"), ASKED),
    "solution_and_vt": (ASKED, (*ASKED, "intro", SOLUTION, "visual_thoughts", "transition")),
}


def size_and_slice(file: str, arg: str, sizes: Iterable[str]) -> tuple[str, str]:
    """A size, and a slice of `SLICES` or "", of the argument of a config file: "8B,v5p-8".

    Raises ValueError, which names the file, for any other.
    """
    size, comma, on = arg.partition(",")
    known = list(sizes)
    if size in known and (on in SLICES or not comma):
        return size, on
    meant = [checks.closest(size, known), *([checks.closest(on, SLICES)] if comma else [])]
    hint = f"; did you mean {','.join(meant)!r}?" if all(meant) else ""
    raise ValueError(
        f"{file}:{arg}: choose from {', '.join(known)}, and after a comma, if at all, a slice "
        f"from {', '.join(SLICES)}{hint}"
    )


def use_slice(c: ConfigDict, name: str) -> None:
    """Settings for a slice of `SLICES`.

    kv heads that four chips cannot share are not divided, so that the batch is divided further.
    Raises ValueError for a batch that is too small for it.
    """
    chips, tensor, at_once = SLICES[name]
    if c.model.llm.num_kv_heads % tensor:
        tensor = 1
    least = min(c[stage].batch_size for stage in ("opsd", "sft", "offline"))
    if least % (chips // tensor):
        raise ValueError(
            f"a batch of {least} sequences cannot be divided over the {chips} chips of {name} for "
            f"{c.model.llm.num_kv_heads} kv heads: choose a smaller slice"
        )
    use_mesh(c, chips // tensor, tensor, at_once)


def use_mesh(c: ConfigDict, fsdp: int, tensor: int, at_once: int) -> None:
    """Settings for all chips of a slice of TPUs: its mesh, keys in blocks, the choice of a kernel.

    In OPSD, SFT and offline, at most at_once sequences at a time for each of the fsdp shards of a
    batch. More of them gather the weights less often and need more memory.

    No size of the mesh is -1: on a slice of another size the run ends with an error before it
    compiles.
    """
    c.mesh.update(data=1, fsdp=fsdp, tensor=tensor)
    c.model.key_block = 1024
    c.model.attention = "auto"
    for stage in ("opsd", "sft", "offline"):
        c[stage].accumulation = max(1, c[stage].batch_size // (fsdp * at_once))


def use_contexts(c: ConfigDict, name: str) -> None:
    """Blocks of student and teacher by a name in `CONTEXTS`."""
    c.student.blocks, c.teacher.blocks = CONTEXTS[name]
