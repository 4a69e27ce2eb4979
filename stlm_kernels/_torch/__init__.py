"""Helpers that the torch paths of several ops share."""
