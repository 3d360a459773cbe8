"""Runs applied to videos that have no labels: `python -m cardiocaps.predict`."""
