"""Helpers that the kernels of several ops share. Importing a module of it imports triton."""
