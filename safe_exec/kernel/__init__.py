"""A kernel born in a sandbox, the client that talks to it, and what runs inside it."""
