"""A server of the Model Context Protocol: agents run notebooks and cells inside limits.

``answers`` are the results of the tools, short forms of the verdict; ``notebooks`` runs and
explains notebooks; ``sandbox`` keeps one kernel for cells; ``server`` declares the tools.
"""
