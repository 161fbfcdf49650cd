"""Synthetic embryos."""
