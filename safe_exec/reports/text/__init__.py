"""Texts that the reports for people share."""
