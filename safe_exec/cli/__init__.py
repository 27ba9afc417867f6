"""One file per sub-command; ``main`` combines them."""
