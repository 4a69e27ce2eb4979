"""Helpers that the ops of a linear projection share."""
