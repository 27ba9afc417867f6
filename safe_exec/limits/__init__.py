"""Limits and isolation from profiles, files, notebooks and options.

A new limit starts in ``spec``. The types are in ``model.limits``, the enforcement in ``sandbox``.
"""
