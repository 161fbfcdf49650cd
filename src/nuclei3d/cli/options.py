"""The options that several commands share, and what every command does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from nuclei3d.console import emit_json

if TYPE_CHECKING:
    from nuclei3d.config import Params

ParamsFile = Annotated[
    Path | None, typer.Option("--params", help="Parameter file; params.yaml if there is one.", metavar="FILE")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one parameter; may be repeated.", metavar="SECTION.KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Slices = Annotated[Path, typer.Option("--slices", help="Folder made by prepare.", metavar="DIR")]
ContrastBins = Annotated[
    Path | None,
    typer.Option("--slices", help="Folder made by prepare: its bins of contrast.", metavar="DIR"),
]
Data = Annotated[Path, typer.Option("--data", help="Folder of labelled embryos.", metavar="DIR")]
ValidationData = Annotated[
    Path | None, typer.Option("--data", help="Labelled embryos, for validation in 3D.", metavar="DIR")
]
ModelFolder = Annotated[Path, typer.Option("--model", help="Model folder.", metavar="DIR")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")]


class Result(Protocol):
    """What a stage gives back."""

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""


def load(file: Path | None, overrides: Sequence[str] | None) -> Params:
    """Load the parameters from a file, or from params.yaml where there is one, and override some."""
    from nuclei3d.config import load_params

    if file is None and Path("params.yaml").is_file():
        file = Path("params.yaml")
    return load_params(file, overrides or ())


def with_options(overrides: Sequence[str] | None, section: str, given: Mapping[str, object]) -> list[str]:
    """Turn options such as --mode into overrides of a section's parameters."""
    named = [f"{section}.{key}={value}" for key, value in given.items() if value is not None]
    return [*(overrides or ()), *named]


def finish(result: Result, as_json: bool) -> None:
    """Print the result of a stage where --json asks for it."""
    if as_json:
        emit_json(result.as_json())
