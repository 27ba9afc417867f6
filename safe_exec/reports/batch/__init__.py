"""Reports on a batch, one module per format."""
