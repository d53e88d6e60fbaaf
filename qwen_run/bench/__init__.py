"""How fast an engine is, here."""
