"""Trains every system that the paper compares and writes every table and figure of the paper."""
