"""Builds the wheel: the package, and in it the method itself, the files of `peft/` in this repository, as `_method`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

METHOD = Path(__file__).resolve().parent.parent.parent / "peft"


class BuildWithMethod(build_py):
    """Copies the method's files, which import each other relatively, so that one source serves two names."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("loramoe-peft cannot be installed with -e: its method is copied in when it is built")
        if not METHOD.is_dir():
            raise SystemExit(f"{METHOD} is missing: build loramoe-peft inside a clone of the LoRAMoE repository")
        package = Path(self.build_lib, "loramoe_peft")
        shutil.rmtree(package, ignore_errors=True)  # what an earlier build left
        super().run()
        shutil.copytree(METHOD, package / "_method", ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithMethod})
