"""Static analysis of code cells: the names they define, use and change."""
