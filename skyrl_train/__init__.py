"""Reinforcement-learning post-training for language models: one loop, three inference engines."""

__version__ = "0.1.0"
