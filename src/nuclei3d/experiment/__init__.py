"""The only place that imports mlflow: runs, provenance, registry and the served model.

Importing this package is cheap; mlflow itself is imported inside the functions that use it. It must be
imported before mlflow: it switches MLflow's and DVC's telemetry off for this process and its children.
"""

import os

for _switch, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}.items():
    os.environ.setdefault(_switch, _value)
