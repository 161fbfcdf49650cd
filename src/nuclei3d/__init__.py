"""Retrain Cellpose on labelled 3D embryos, measure it honestly, serve it, segment time-lapses."""

__version__ = "0.1.0"
