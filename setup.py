"""Installs qualivision; everything it says comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here/"README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license="MIT",
    license_files=["LICENSE"],
    url=cfg["git_url"],
    packages=find_packages(include=["qualivision", "qualivision.*"]),
    package_data={"qualivision.evaluation": ["*.json"],
                  "qualivision.models": ["*.json", "*.safetensors"],
                  "qualivision.official": ["*.json"],
                  "qualivision.commands": ["self_test/*"],
                  "qualivision": ["weights/*/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "wandb": cfg["wandb_requirements"].split(),
        "tensorboard": cfg["tensorboard_requirements"].split(),
        "onnx": cfg["onnx_requirements"].split(),
        "openvino": cfg["openvino_requirements"].split(),
        "gpu": cfg["gpu_requirements"].split(),
        "clips": cfg["clips_requirements"].split(),
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
