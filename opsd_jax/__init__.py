"""Visual-OPSD in JAX: on-policy self-distillation of unified multimodal models, built for TPUs."""

__version__ = "0.1.0"
