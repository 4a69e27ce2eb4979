"""Helpers that the benchmark run and the commands share."""
