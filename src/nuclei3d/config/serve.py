"""Parameters of the HTTP service."""

from typing import Annotated

from pydantic import Field

from nuclei3d.config.section import Section

PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeParams(Section):
    """Limits of the service around a model.

    Attributes
    ----------
    root
        Folder below which requests may name files by path; None refuses paths.
    queue
        Requests that may wait while one is computed; the next is answered 503.
    max_body_mb
        Largest body of a request.
    max_voxels
        Largest volume, by what its header declares, before anything is read. Choose it so that the prediction
        of one such volume fits the memory.
    timeout_s
        Longest time from a request's arrival to its answer.
    shutdown_s
        How long a stopping service lets the request that is being computed finish.
    token_variable
        Environment variable with the bearer token that requests must carry; no token is asked for where
        it is unset. The token itself is never written into a file.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 5050
    root: str | None = None
    queue: Annotated[int, Field(ge=0)] = 16
    max_body_mb: PositiveInt = 512
    max_voxels: PositiveInt = 100_000_000
    timeout_s: Seconds = 1800.0
    shutdown_s: Seconds = 60.0
    token_variable: str = "NUCLEI3D_TOKEN"
