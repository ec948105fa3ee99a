"""uv, which resolves and installs for `make lock` and `make versions`, in its own environment.

Everything lies in ``.versions/``, which git ignores and which may be removed at any time. uv reads
its own settings (UV_DEFAULT_INDEX, UV_INDEX, UV_FIND_LINKS), not those of pip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"


def uv(*arguments: str | Path) -> str:
    """Run uv in the project's folder, installing it first if need be; its stdout.

    Raises:
        SystemExit: uv failed; what it said is on stderr.
    """
    python = FOLDER / "uv/bin/python"
    tool = python.with_name("uv")
    if not tool.exists():
        venv.create(FOLDER / "uv", clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    done = subprocess.run([tool, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"uv {arguments[0]} {arguments[1]} failed; see above")
    return done.stdout


def resolve(*arguments: str | Path) -> str:
    """Exact versions of the project and its extra `dev`, the newest that the ranges allow."""
    return uv(
        "pip",
        "compile",
        "pyproject.toml",
        "--extra=dev",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--no-emit-index-url",
        "--no-emit-find-links",
        *arguments,
    )


def pins(requirements: str) -> dict[str, str]:
    """Name -> version of the lines `name==version ; marker`."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", requirements, flags=re.MULTILINE))
