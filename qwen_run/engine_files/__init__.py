"""An engine directory read as files, without a session: checksums, graph, weights."""
