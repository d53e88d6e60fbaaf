"""Token ids in, tokens out: the session, its cache, who runs when."""
