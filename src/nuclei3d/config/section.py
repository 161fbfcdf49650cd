"""What all sections of the parameters share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of params.yaml: unknown names are refused, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
