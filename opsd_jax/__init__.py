"""Visual-OPSD in JAX: on-policy self-distillation of unified multimodal models, built for TPUs.

    run = opsd_jax.open_run(W)                      settings, examples and results of a run
    model = opsd_jax.load(W)                        a model that answers questions
    answer = opsd_jax.answer(model, image, "...")   its text, and images if it generates some
    opsd_jax.score(example, answer.text)            the answer in a text, and whether it is right

    config = opsd_jax.read_config(FILE, {...})      settings of a file, with changes
    run = opsd_jax.train_run(config, W)             trains a run and its control arms
    opsd_jax.evaluate_run(W, "real")                evaluates its newest checkpoint

These names are imported when they are first used: `import opsd_jax` alone loads no library.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# {name here: (module, name there, {option in its messages: the argument, if it has another name})}
_PUBLIC: dict[str, tuple[str, str, dict[str, str]]] = {
    "open_run": ("opsd_jax.run.session", "open_run", {}),
    "load": ("opsd_jax.run.model", "load", {"checkpoint": "directory"}),
    "answer": ("opsd_jax.run.answering", "answer", {}),
    "score": ("opsd_jax.evaluation.benchmark", "score", {}),
    "read_config": ("opsd_jax.config_file", "read", {"config": "path"}),
    "train_run": ("opsd_jax.train", "train_run", {}),
    "evaluate_run": ("opsd_jax.run.evaluate", "evaluate_run", {}),
}


def __getattr__(name: str) -> Any:
    if name == "interleave":  # a module: importing it sets the name
        return importlib.import_module("opsd_jax.interleave")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'opsd_jax' has no attribute {name!r}")
    module, there, options = _PUBLIC[name]
    calls = importlib.import_module("opsd_jax.inputs.calls")
    function = calls.named(getattr(importlib.import_module(module), there), options)
    return globals().setdefault(name, function)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "interleave"})
