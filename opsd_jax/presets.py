"""What the files in configs/ share: a size and a slice by name, and contexts by name."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from opsd_jax.inputs import checks

# Slice: (its chips, mesh.tensor where the heads allow it); for models of up to 8B parameters.
SLICES = {"v5p-8": (4, 1), "v6e-16": (16, 4), "v5e-16": (16, 4)}

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
    size, _, on = arg.partition(",")
    known = list(sizes)
    if size not in known or on not in ("", *SLICES):
        raise ValueError(
            f"{file}:{arg}: choose from {', '.join(known)}, and after a comma, if at all, a slice "
            f"from {', '.join(SLICES)}"
            + (checks.did_you_mean(size, known) if size not in known else "")
            + (checks.did_you_mean(on, SLICES) if on not in ("", *SLICES) else "")
        )
    return size, on


def use_slice(c: ConfigDict, name: str) -> None:
    """Settings for a slice of `SLICES`. Few kv heads are not divided over chips."""
    chips, tensor = SLICES[name]
    tensor = 1 if c.model.llm.num_kv_heads % tensor else tensor
    use_mesh(c, chips // tensor, tensor)


def use_mesh(c: ConfigDict, fsdp: int, tensor: int) -> None:
    """Settings for all chips of a slice of TPUs: its mesh, and one sequence per device at a time.

    No size of the mesh is -1: on a slice of another size the run ends with an error before it
    compiles.
    """
    c.mesh.update(data=1, fsdp=fsdp, tensor=tensor)
    c.model.key_block = 1024
    c.model.attention = "auto"
    for stage in ("opsd", "sft", "offline"):
        c[stage].accumulation = c[stage].batch_size // fsdp


def use_contexts(c: ConfigDict, name: str) -> None:
    """Blocks of student and teacher by a name in `CONTEXTS`."""
    c.student.blocks, c.teacher.blocks = CONTEXTS[name]
