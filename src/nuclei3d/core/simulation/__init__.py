"""Synthetic embryos with exact labels."""
