"""The HTML page of a batch."""
