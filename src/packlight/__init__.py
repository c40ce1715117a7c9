"""Fit a language model into the machine you have, and prove what it cost."""

__version__ = "0.1.0"
