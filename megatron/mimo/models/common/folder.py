"""Checks that a Hugging Face folder consists of files of its own.

A folder is data from elsewhere. Symbolic links in it would bring other files of this machine into
a checkpoint, or into what is exported from it.
"""

from __future__ import annotations

from pathlib import Path

from megatron.core.models.mimo.errors import ConfigError

__all__ = ["check_links"]

# The hub's cache: models--owner--name/snapshots/<revision>/file -> ../../blobs/<hash>
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def check_links(folder: Path) -> None:
    """Refuse symbolic links that leave a folder, and what is neither file nor folder.

    Links of the hub's own cache may leave it.

    Args:
        folder: a Hugging Face model's directory; it may be a link itself.

    Raises:
        ConfigError: one of its entries, at any depth, leads elsewhere or nowhere, or is a pipe, a
            device or a socket.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == _SNAPSHOTS:
        roots.append(root.parent.parent / _BLOBS)
    for path in _entries(root):
        if path.is_symlink() and not any(_leads_into(path, one) for one in roots):
            raise ConfigError(
                f"{folder / path.relative_to(root)} is a symbolic link to {path.readlink()}, "
                f"outside of {folder}; expected files of the model: put the file itself there "
                "(cp -rL copies a folder with what its links lead to)"
            )
        if not path.is_file() and not path.is_dir():
            raise ConfigError(
                f"{folder / path.relative_to(root)} is a pipe, a device, a socket or a link to "
                "itself; expected files and folders of the model: remove it"
            )


def _leads_into(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # it leads to itself
        return False


def _entries(folder: Path) -> list[Path]:
    """All that a folder holds, hidden entries left out; links are not followed."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        found.append(path)
        if path.is_dir() and not path.is_symlink():
            found += _entries(path)
    return found
