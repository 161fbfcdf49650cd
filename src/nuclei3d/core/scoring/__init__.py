"""Overlaps, metrics, contrast, intervals and the baseline without a network."""
