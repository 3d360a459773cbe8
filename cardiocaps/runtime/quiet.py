"""Silence for the libraries that a program uses."""

import logging
import warnings


def quiet() -> None:
    """Silence notes of Lightning and torch; errors and messages of this program stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"lightning\..*", r"torch\.jit\..*", r"torchmetrics\..*"):
        warnings.filterwarnings("ignore", module=module)
    # That changing a network's output in place would be wrong; nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
