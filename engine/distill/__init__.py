"""Distillation: a smaller student that learns from the model."""
