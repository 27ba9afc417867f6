"""A process outside the sandbox that reads the native stack of a dying kernel with pystack."""
