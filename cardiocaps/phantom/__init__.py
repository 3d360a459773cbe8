"""A synthetic parasternal long-axis echocardiogram study on disk, in the layout of EchoNet-LVH.

`anatomy` is the moving heart, `patients` who has which heart and which machine settings, `ultrasound`
the image, `dataset` the folder, `preview` a contact sheet. The command line:
`python -m cardiocaps.phantom --help`.
"""

from cardiocaps.phantom.dataset import phantom_is_complete, write_phantom

__all__ = ["phantom_is_complete", "write_phantom"]
