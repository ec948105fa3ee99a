"""Lists the packages and keeps the wheel out of the folders that megatron-core owns.

In a checkout the library lies at ``megatron/core/models/mimo``. megatron-core's wheel owns that
very folder, and two wheels with the same file overwrite each other on install and delete each
other's on uninstall. So a wheel of this project carries the library as
``megatron/mimo/_overlay/mimo``, where the finder in ``megatron/__init__.py`` looks first. Metadata
is in pyproject.toml.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

LIBRARY = "megatron.core.models.mimo"
LIBRARY_IN_WHEEL = "megatron.mimo._overlay.mimo"


def project_packages() -> list[str]:
    """Every package of this checkout, the library under its import name."""
    folder = LIBRARY.replace(".", "/")
    training = find_packages(include=["megatron", "megatron.mimo", "megatron.mimo.*"])
    library = [LIBRARY, *(f"{LIBRARY}.{name}" for name in find_packages(folder))]
    return training + library


class BuildWithLibraryMoved(build_py):
    """Builds the library's packages under the name that gives them a folder of their own."""

    def finalize_options(self) -> None:
        """Rename the library's packages and map the new name to the folder in the checkout."""
        super().finalize_options()
        self.packages = [name.replace(LIBRARY, LIBRARY_IN_WHEEL, 1) for name in self.packages]
        self.package_dir[LIBRARY_IN_WHEEL] = LIBRARY.replace(".", "/")


setup(packages=project_packages(), cmdclass={"build_py": BuildWithLibraryMoved})
