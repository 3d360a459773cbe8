"""The version of capsops and of cardiocaps, which are always released together."""

__version__ = "0.1.0"
