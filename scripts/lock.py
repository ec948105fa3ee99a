"""Write requirements.lock: the exact versions that `make setup` installs, and how large they are.

make lock                                      the newest that the ranges of pyproject.toml allow
make lock ARGS="--exclude-newer 2026-11-01"    any option of `uv pip compile`

One file serves Python 3.12 and newer on every platform, by markers. It names no index: pip takes
it as constraints, from wherever it installs. The versions are then installed once, which shows that
they can be and what they fill. Before committing a new lock run `make versions` and `make test`.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from scripts.uv import ROOT, pins, resolve, uv

LOCK = ROOT / "requirements.lock"
# What only a CUDA build of torch needs, and what torch's CPU build takes in its place (2.13.0+cpu).
CUDA_ONLY = ("nvidia-", "cuda-", "triton", "torch")
CPU_TORCH = {"download": 0.2e9, "disk": 0.7e9}
HEADER = """\
# What `make setup` installs: versions that passed the suite. Written by `make lock`; do not edit.
# Sizes on Linux x86-64, which setup says before it begins:
# cuda: {cuda[0]:.1f} GB to download, {cuda[1]:.1f} GB on disk
# cpu: {cpu[0]:.1f} GB to download, {cpu[1]:.1f} GB on disk
"""


def main(arguments: list[str]) -> None:
    """Resolve, install once, measure, write."""
    if {"-h", "--help"} & set(arguments):
        sys.exit(__doc__)
    locked = resolve("--universal", "--python-version=3.12", *arguments)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(locked)
        downloads = download_sizes(requirements)
        disk = disk_sizes(requirements, Path(folder) / "environment")
    text = header(downloads, disk)
    LOCK.write_text(text + locked)
    print(f"{text}{LOCK.name}: {len(pins(locked))} packages; next: make versions, make test")


def header(downloads: dict[str, int], disk: dict[str, int]) -> str:
    """The lock's first lines, from bytes by package; setup reads them."""
    cuda = [sum(downloads.values()) / 1e9, sum(disk.values()) / 1e9]
    cpu = [
        (without_cuda(downloads) + CPU_TORCH["download"]) / 1e9,
        (without_cuda(disk) + CPU_TORCH["disk"]) / 1e9,
    ]
    return HEADER.format(cuda=cuda, cpu=cpu)


def without_cuda(sizes: dict[str, int]) -> int:
    """What is left of the sum of sizes where torch is built without CUDA."""
    return sum(size for name, size in sizes.items() if not name.lower().startswith(CUDA_ONLY))


def download_sizes(requirements: Path) -> dict[str, int]:
    """Bytes of the archive of each package, as the index gives them."""
    platform = ("--python-version=3.12", "--python-platform=x86_64-unknown-linux-gnu")
    listed = uv(
        "pip",
        "compile",
        requirements,
        "--no-deps",
        "--quiet",
        "--format=pylock.toml",
        *platform,
    )
    return {
        package["name"]: next(iter(package.get("wheels", [])), package.get("sdist"))["size"]
        for package in tomllib.loads(listed)["packages"]
    }


def disk_sizes(requirements: Path, environment: Path) -> dict[str, int]:
    """Bytes of the files of each package, after installing all into a new environment."""
    uv("venv", "--quiet", f"--python={sys.executable}", environment)
    uv("pip", "install", "--quiet", f"--python={environment}", "--requirement", requirements)
    (packages,) = environment.glob("lib/python3.*/site-packages")
    return {
        one.name: sum(file.locate().stat().st_size for file in one.files or [])
        for one in distributions(path=[str(packages)])
    }


if __name__ == "__main__":
    main(sys.argv[1:])
