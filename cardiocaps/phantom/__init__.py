"""A synthetic study of echocardiograms (parasternal long axis) on disk, in the layout of EchoNet-LVH.

`anatomy` is the moving heart; `patients` draws hearts and machine settings; `ultrasound` makes the images; `dataset`
writes the folder; `preview` draws a contact sheet. Command line: `python -m cardiocaps.phantom --help`.
"""

from cardiocaps.phantom.dataset import phantom_is_complete, write_phantom

__all__ = ["phantom_is_complete", "write_phantom"]
