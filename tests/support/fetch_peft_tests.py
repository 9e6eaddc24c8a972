"""Gets the test suite of the installed PEFT version, which its wheel leaves out and its source archive holds.

Run ``python tests/support/fetch_peft_tests.py``. The suite goes to ``.cache/peft-<version>/tests``, which git ignores; nothing
of it is part of this repository. A suite that is there already is not fetched again.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def suite_directory() -> Path:
    """Where the suite of the installed PEFT version is, or will be: the parent of its ``tests`` package."""
    return CACHE / f"peft-{version('peft')}"


def fetch() -> Path:
    """Download the suite unless it is there, and return `suite_directory`.

    Raises:
        RuntimeError: pip could not download the source archive; the message holds what pip said.
    """
    destination = suite_directory()
    if destination.exists():
        return destination
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        source = Path(temporary)
        requirement = f"peft=={version('peft')}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", requirement]
        pip = subprocess.run([*command, "--dest", str(source)], capture_output=True, text=True)
        if pip.returncode != 0:
            raise RuntimeError(f"`{' '.join(command[1:])}` failed: {pip.stderr.strip()}")
        (archive,) = source.glob("peft-*.tar.gz")
        suite = source / archive.name.removesuffix(".tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.startswith(f"{suite.name}/tests/"):
                    _extract(tar, member, source)
        # the archive has no `__init__.py`, but its modules import each other relatively
        (suite / "tests" / "__init__.py").touch()
        # so that pytest does not go on to the settings of this repository, which do not fit here
        (suite / "pytest.ini").write_text("[pytest]\n")
        suite.rename(destination)  # last, so that what exists is complete
    return destination


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> None:
    """Write a file of the archive below `directory`, and nowhere else; Python before 3.11.4 has no filter for that."""
    path = (directory / member.name).resolve()
    content = tar.extractfile(member)
    assert content is not None
    assert path.is_relative_to(directory.resolve()), member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.read())


if __name__ == "__main__":
    print(fetch())
