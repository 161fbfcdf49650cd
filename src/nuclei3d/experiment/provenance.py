"""Where a result comes from: commit, data, parameters, environment, seed and device."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from nuclei3d.config import Params
from nuclei3d.digests import digest_of

UNKNOWN = "unknown"
_NAMED_PACKAGES = ("nuclei3d", "torch", "cellpose", "numpy", "scipy", "tifffile", "mlflow", "dvc")


@dataclass(frozen=True)
class Provenance:
    """What one run was made from.

    `git_dirty` says whether tracked files (dvc.lock aside) or sources differ from the commit, or an input
    from its ``.dvc`` file; `input_md5` is by name, such as ``data``; `versions` are those of Python and of
    the packages that decide the result; `device` is ``cpu`` or the name of the GPU.
    """

    git_commit: str
    git_dirty: bool
    input_md5: Mapping[str, str]
    versions: Mapping[str, str]
    seed: int
    device: str
    host: str

    def as_tags(self) -> dict[str, str]:
        """Give it as flat tags ``nuclei3d.<what>``."""
        tags = {
            "nuclei3d.git_commit": self.git_commit,
            "nuclei3d.git_dirty": str(self.git_dirty).lower(),
            "nuclei3d.seed": str(self.seed),
            "nuclei3d.device": self.device,
            "nuclei3d.host": self.host,
        }
        tags |= {f"nuclei3d.{name}_md5": md5 for name, md5 in self.input_md5.items()}
        deciding = ("python", "torch", "cellpose", "numpy")
        tags["nuclei3d.environment"] = ", ".join(
            f"{name} {self.versions[name]}" for name in deciding if name in self.versions
        )
        if self.git_commit != UNKNOWN:
            tags["mlflow.source.git.commit"] = self.git_commit
        return tags


def trace_provenance(params: Params, inputs: Mapping[str, Path], *, device: str | None = None) -> Provenance:
    """Look up where the result about to be made comes from.

    What an input itself was made from is taken over: slices name their data set, a model its slices and data.
    `device` is the parameter of the stage (``auto``, ``cpu``, ``cuda``); None means that the stage computes
    on the CPU only.
    """
    commit, dirty = git_state()
    sources = (_read_json(path / "summary.json").get("data") for path in inputs.values())
    tracked = [*inputs.values(), *(Path(source) for source in sources if isinstance(source, str))]
    return Provenance(
        git_commit=commit,
        git_dirty=dirty or any(map(differs_from_dvc, tracked)),
        input_md5=_inherited_md5(inputs) | {name: md5_of_input(path) for name, path in inputs.items()},
        versions=package_versions(),
        seed=params.seed,
        device=_device_name(device),
        host=platform.node(),
    )


def git_state(folder: Path | None = None) -> tuple[str, bool]:
    """Give the commit of the project around `folder` and whether it has changes that are not committed.

    Inside a DVC stage dvc.lock is always changed, so it does not count; files that Git does not know count
    only among the sources.
    """
    here = folder or Path.cwd()
    commit = _git(here, "rev-parse", "HEAD")
    if commit is None:
        return UNKNOWN, False
    top = Path(_git(here, "rev-parse", "--show-toplevel") or here)
    changed = _git(top, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    unknown = _git(top, "ls-files", "--others", "--exclude-standard", "--", "src")
    return commit, bool(changed) or bool(unknown)


def md5_of_input(path: Path) -> str:
    """Give the MD5 of an input file or folder, by its content.

    A slice data set's is that of its samples, as its summary.json says; a folder's is the one that DVC gives
    it. What is tracked by DVC and not here has the one in its ``.dvc`` file.
    """
    if not path.exists():
        return _md5_in_dvc_file(path) or UNKNOWN
    summarised = _read_json(path / "summary.json").get("md5")
    return summarised if isinstance(summarised, str) else digest_of(path)


def differs_from_dvc(path: Path) -> bool:
    """Tell whether an input is tracked by DVC and no longer what its ``.dvc`` file says."""
    tracked = _md5_in_dvc_file(path)
    return tracked is not None and path.exists() and digest_of(path) != tracked


def package_versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that decide the result."""
    versions = {"python": platform.python_version()}
    for name in _NAMED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment_listing() -> str:
    """Give every installed package with its version, one ``name==version`` a line."""
    found = {str(item.metadata["Name"]).lower(): item.version for item in metadata.distributions()}
    head = f"# Python {sys.version.split()[0]} on {platform.platform()}\n"
    return head + "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def _inherited_md5(inputs: Mapping[str, Path]) -> dict[str, str]:
    inherited: dict[str, str] = {}
    for path in inputs.values():
        data = _read_json(path / "summary.json").get("data")
        if isinstance(data, str) and Path(data).is_dir():
            inherited["data"] = md5_of_input(Path(data))
        origin = _read_json((path if path.is_dir() else path.parent) / "model.json").get("lineage")
        if isinstance(origin, dict):
            inherited |= {
                str(name).removesuffix("_md5"): str(md5)
                for name, md5 in origin.items()
                if str(name).endswith("_md5")
            }
    return inherited


def _read_json(path: Path) -> dict[str, object]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _device_name(device: str | None) -> str:
    if device is None or device == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _md5_in_dvc_file(path: Path) -> str | None:
    file = path.with_name(f"{path.name}.dvc") if path.name else None
    if file is None or not file.is_file():
        return None
    try:
        outs = yaml.safe_load(file.read_text(encoding="utf-8"))["outs"]
        return str(outs[0]["md5"])
    except (OSError, yaml.YAMLError, KeyError, IndexError, TypeError):
        return None
