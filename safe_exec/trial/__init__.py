"""One trial: a list of cells, run in a fresh kernel in a fresh sandbox.

Its result contains facts only, no interpretation.

``request`` defines the input and the result, ``state`` the data that the parts share during the
run. ``run`` leads from the start of the kernel to its end, ``cell_loop`` runs the cells,
``sampler`` measures usage meanwhile, ``metrics`` keeps the figures, and ``evidence`` collects the
evidence. Cells keep their index in the notebook.
"""
