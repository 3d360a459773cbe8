"""Maps that show where in a frame a network finds a class: `python -m cardiocaps.explain`."""
