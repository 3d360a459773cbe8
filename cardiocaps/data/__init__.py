"""Echocardiogram videos and their labels, from the folder on disk to batches."""
