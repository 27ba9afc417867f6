"""Reports: one module per format, each of which reads a verdict (or the stream of events) and nothing else.

``verdict_json`` the document, ``annotated`` the notebook, ``terminal`` the diagnosis, ``progress`` what is seen before
it, ``event_log`` the run as JSON lines; ``text`` and ``culprit_text`` are what those for people share. They import
``model``, ``events``, ``errors``, ``units`` and the names that ``notebook`` gives our marks.
"""
