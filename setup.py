"""What the project is called, what it needs and what is optional. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRES = [
    "torch>=2.13",
    "numpy>=1.26",
    "omegaconf>=2.3",
    "einops>=0.8",
    "transformers>=5.0",
    "tokenizers>=0.21",
    "safetensors>=0.5",
    "huggingface_hub>=1.0",
    "pillow>=10.1",
    "tqdm>=4.66",
    "invisible-watermark>=0.2.0",
]

EXTRAS = {
    "train": ["pytorch-lightning>=2.6,!=2.6.2,!=2.6.3", "tensorboard>=2.17"],
    "eval": ["torch-fidelity>=0.3.0", "matplotlib>=3.8"],
    "web": ["gradio>=5.0"],
    "ray": ["ray>=2.40"],
}
EXTRAS["test"] = [
    "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9", "diffusers>=0.35", "scipy>=1.13", "peft>=0.17",
    "matplotlib>=3.8", *EXTRAS["train"],
]


setup(
    name="ldm",
    version="0.1.0",
    description="The CompVis Stable Diffusion scripts on today's stack",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm": ["modules/encoders/data/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
