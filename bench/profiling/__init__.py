"""Profilers on a GPU: Nsight Compute and Proton."""
