"""The two networks, their weights, and the model as a folder."""
