"""Mamba sequence models for DNA and raw audio."""

__version__ = "0.1.0"
