"""A synthetic study of echocardiograms (parasternal long axis) on disk, in the layout of EchoNet-LVH.

`anatomy` is the moving heart; `patients` draws hearts and machine settings, as hard to classify as `variants` says;
`ultrasound` makes the images, with the flaws of `effects`; `dataset` writes the folder; `ceiling` says how well the
label can be known at all; `preview` draws a contact sheet. Command line: `python -m cardiocaps.phantom --help`.
"""

from cardiocaps.phantom.dataset import phantom_is_complete, write_phantom
from cardiocaps.phantom.variants import Shift, Variant

__all__ = ["Shift", "Variant", "phantom_is_complete", "write_phantom"]
