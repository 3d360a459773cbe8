"""EchoNet-LVH: its reader, its table of measurements, its labels."""
