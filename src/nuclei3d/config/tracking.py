"""Parameters of MLflow tracking and registry."""

from typing import Annotated

from pydantic import Field

from nuclei3d.config.section import Section


class TrackingParams(Section):
    """Where runs and models go.

    `uri` None means the environment variable MLFLOW_TRACKING_URI, else mlflow.db in the project directory.
    Runs are grouped in `experiment`; models are registered as `registered_name`. With `enabled` false
    nothing is recorded.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "nuclei3d"
    registered_name: Annotated[str, Field(pattern=r"^[^/:.%\"']+$")] = "nuclei_3d"
