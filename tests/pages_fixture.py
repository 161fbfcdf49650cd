"""The pages of the documentation: where they lie, and the blocks of commands in them."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    """Leave out the store of the test before, which MLflow itself puts there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
