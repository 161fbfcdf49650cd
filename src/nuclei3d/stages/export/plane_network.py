"""The network of a bioimage.io package; this file goes into the package, beside the weights."""

from __future__ import annotations

from cellpose.resnet_torch import CPnet
from torch import Tensor


class PlaneNetwork(CPnet):  # type: ignore[misc]
    """Cellpose's CPnet without the outputs that only Cellpose itself uses (style and features)."""

    def forward(self, data: Tensor) -> Tensor:
        """Give (batch, 3, y, x): five times the flow in y and in x, and the logit of being a nucleus."""
        flows: Tensor = super().forward(data)[0]
        return flows
