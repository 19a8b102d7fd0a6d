"""Measuring: each file takes a loaded model, or two, and returns measurements with error and protocol."""
