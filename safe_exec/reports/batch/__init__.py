"""Reports on many notebooks, one module per format."""
