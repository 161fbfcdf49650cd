"""Nuclei linked over time."""
