"""What `pyproject.toml` cannot say: `conf/`, at top level for people, is built into the package, as `distill/conf/`."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["distill*", "teacher*", "student*", "losses*"]),
        "distill.conf",
        *(f"distill.conf.{group}" for group in find_namespace_packages("conf")),
    ],
    package_dir={"distill.conf": "conf"},
    package_data={"": ["*.yaml", "*.json", "*.css"]},
)
