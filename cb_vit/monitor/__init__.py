"""Watching a run: its metrics, curves, speed and profiles."""
