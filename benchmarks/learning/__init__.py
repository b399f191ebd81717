"""Whole runs of the main job, side by side: what they learned and how long it took."""
