"""Plug-ins for other tools, one file per tool; no other module imports them."""
