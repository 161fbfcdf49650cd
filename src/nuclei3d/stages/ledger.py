"""Which stages of a job are done: kept beside their outputs, so that a killed job goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nuclei3d
from nuclei3d.console import say
from nuclei3d.volumes.whole import whole_file

# Parts of the package that cannot change what a stage computes.
_OUTSIDE = frozenset({"cli", "__main__.py", "console.py", "serving", "tracking", "report"})


@dataclass(frozen=True)
class Entry:
    """What is known of a stage that is done: its result as JSON, and whether this call did it."""

    result: dict[str, Any]
    fresh: bool


class Ledger:
    """Records of finished stages in a folder, one file each.

    A stage counts as done if its parameters, its inputs and the package's code are those of the record, and
    its outputs are as it left them. Files are compared by name, size and time of change.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._code = code_fingerprint()

    def do(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        work: Callable[[], dict[str, Any]],
    ) -> Entry:
        """Do a stage, or find that it is done.

        Parameters
        ----------
        stage
            Its name.
        settings
            The parameters on which its result depends, as plain data.
        inputs, outputs
            Files and folders that it reads and writes.
        work
            Does it and gives its result as plain data.
        """
        inputs, outputs = list(inputs), list(outputs)
        key = _digest(
            {"settings": settings, "inputs": [fingerprint(path) for path in inputs], "code": self._code}
        )
        known = self.read(stage)
        if known.get("key") == key and known.get("outputs") == [fingerprint(path) for path in outputs]:
            say(f"{stage}: done before with the same inputs, kept")
            return Entry(known["result"], fresh=False)
        result = work()
        self.write(stage, {"key": key, "outputs": [fingerprint(path) for path in outputs], "result": result})
        return Entry(result, fresh=True)

    def read(self, name: str) -> dict[str, Any]:
        """Read a record; empty where there is none that can be read."""
        try:
            record = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all."""
        with whole_file(self._folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def fingerprint(path: Path) -> str:
    """Give a text that changes when a file, or anything in a folder, does (name, size, time of change)."""
    if path.is_dir():
        files = sorted(
            found
            for found in path.rglob("*")
            if found.is_file() and not any(part.startswith(".") for part in found.relative_to(path).parts)
        )
        base = path
    elif path.exists():
        files, base = [path], path.parent
    else:
        return "absent"
    listing = []
    for file in files:
        status = file.stat()
        listing.append((file.relative_to(base).as_posix(), status.st_size, status.st_mtime_ns))
    return _digest(listing)


def code_fingerprint() -> str:
    """Give the MD5 of the modules of this package that can change a result."""
    package = Path(nuclei3d.__file__).parent
    digest = hashlib.md5(usedforsecurity=False)
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        if relative.parts[0] not in _OUTSIDE:
            digest.update(relative.as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _digest(tree: object) -> str:
    text = json.dumps(tree, sort_keys=True, default=str)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
