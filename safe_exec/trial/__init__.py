"""One trial: a list of cells run in a fresh kernel in a fresh sandbox. Gives facts, no opinions.

``request`` says what to run and what comes back, ``state`` is what its parts share while it runs, ``run`` leads from the start of the kernel
to its end, ``cells`` runs the cells, ``sampling`` looks at usage meanwhile, ``metrics`` keeps the figures, and ``collect_evidence`` puts the evidence
together. Cells keep the index they have in the notebook.
"""
