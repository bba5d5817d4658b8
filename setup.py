"""`pip install -e .`: the framework's core; extras bring what only some users need."""

from setuptools import find_packages, setup

setup(
    name="EasyLM-LVM",
    version="0.1.0",
    description="Large Vision Models in JAX: visual sentences, training on a mesh, prompting",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["EasyLM*", "tokenizer*", "evaluation*"]),
    package_data={"tokenizer": ["pretrained/*"], "evaluation": ["demo_model/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint",
        "einops",
        "ml_collections",
        "absl-py",
        "wandb",
        "numpy",
        "safetensors",
        "msgpack",
        "pillow",
        "tqdm",
        "orjson",  # JSON lines at 10 times the rate of json
        "pybase64",  # base64 with SIMD
        "zstandard",  # .zst inputs
        "fsspec",  # remote paths: gs://, s3://, hf://
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "torch": ["torch", "transformers>=5"],
        "video": ["av>=16"],
        "text": ["datasets", "sentencepiece", "tokenizers"],
        "serve": ["gradio>=6", "fastapi", "fastapi-offline", "uvicorn", "python-multipart"],
        "quickstart": ["scikit-image", "scikit-learn", "matplotlib"],
        "dev": ["pytest", "ruff", "mypy", "scikit-image", "scikit-learn", "matplotlib", "av>=16", "httpx", "selenium"],
    },
)
