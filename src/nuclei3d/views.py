"""The three directions in which a volume (z, y, x) is cut into planes."""

from __future__ import annotations

from typing import Literal

View = Literal["xy", "xz", "yz"]

VIEWS: tuple[View, ...] = ("xy", "xz", "yz")

VIEW_AXIS: dict[str, int] = {"xy": 0, "xz": 1, "yz": 2}
"""The axis along which the planes of a view are counted."""

VIEW_AXES: dict[str, tuple[int, int]] = {"xy": (1, 2), "xz": (0, 2), "yz": (0, 1)}
"""The axes of a plane, which are also the components of the flow that it shows."""
