"""Pruning: fewer weights that are not zero."""
