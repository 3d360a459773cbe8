"""Tests of the paper's claims: shifted tests of the trained systems, their equivariance to the angle, and verdicts."""
