"""The sandbox of one kernel: mechanisms, folded into a plan that the keeper carries out."""
