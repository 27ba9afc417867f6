"""Notebook files: read, validated, written."""
