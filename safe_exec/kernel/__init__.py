"""A kernel in a sandbox, the client that talks to it, and the agent inside it."""

from safe_exec.platforms import refuse_elsewhere

# Other systems than Linux are refused by the import: Jupyter loads the provisioner by its entry
# point, and shows what is raised.

refuse_elsewhere()
