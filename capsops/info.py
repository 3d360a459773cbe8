"""`python -m capsops.info`: what was built, what runs here, and why not the rest."""

from .backends import info

if __name__ == "__main__":
    print(info())
