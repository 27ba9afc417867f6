"""One file per job of a command (run, bisect, probe, replay), and the steps they share."""
