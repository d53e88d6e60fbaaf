"""An engine in stages, each in a process of its own: some layers of it, their weights and their part of the cache."""
