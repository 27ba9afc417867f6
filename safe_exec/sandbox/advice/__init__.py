"""Advice on weak limits and isolation, as commands that can be pasted."""
