"""Wording that the reports for people share."""
