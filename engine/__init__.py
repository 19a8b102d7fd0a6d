"""Maquette's engine: compress causal language models and measure what it cost. Knows no web page."""
