"""Where people already are: pytest and papermill run their notebooks by safe-exec. One file per tool; nothing of ours imports them."""
