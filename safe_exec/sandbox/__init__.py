"""The living enclosure of one kernel: one file per mechanism, folded into a plan that the keeper carries out."""
