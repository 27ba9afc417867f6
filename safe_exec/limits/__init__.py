"""The values of limits and isolation, from profiles, files, notebooks and options.

A new limit starts in ``spec``. Its type is in ``model.limits``. ``sandbox.mechanisms`` enforces it:
a limit of control groups in ``cgroup_v1`` and ``cgroup_v2`` there.
"""
