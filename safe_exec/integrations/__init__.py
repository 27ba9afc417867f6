"""Plug-ins for other tools: pytest and papermill. One file per tool; no other module imports them."""
