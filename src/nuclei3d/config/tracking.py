"""Parameters of MLflow tracking and registry."""

from nuclei3d.config.section import Section


class TrackingParams(Section):
    """Where runs go. `uri` None means MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "nuclei3d"
    registered_name: str = "nuclei_3d"
