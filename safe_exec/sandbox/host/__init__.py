"""Facts about this machine: capabilities, control groups, containers."""
