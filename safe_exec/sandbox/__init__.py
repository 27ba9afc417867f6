"""The sandbox of one kernel: mechanisms make offers, and the keeper carries out the joint plan."""
