"""The HTTP service around a registered model, and its client."""
