"""One file per mechanism that enforces limits or isolation."""
