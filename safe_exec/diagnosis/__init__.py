"""Turns evidence into a verdict, by rules that are pure functions."""
