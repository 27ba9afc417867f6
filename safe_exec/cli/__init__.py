"""One file per sub-command; ``cli`` puts them together."""
