"""Echocardiogram videos and their measurements, from the folder on disk to batches.

``video`` decodes, ``measurements`` reads the table, ``labels`` and ``splits`` hold the rules, ``echonet``
puts a folder together, ``cache`` keeps decoded frames, ``views`` makes the nine channels, ``datamodule``
feeds Lightning.
"""

from cardiocaps.data.echonet_lvh import Clip, Study, read_folder

__all__ = ["Clip", "Study", "read_folder"]
