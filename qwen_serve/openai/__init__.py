"""OpenAI's interfaces: requests in, answers out; nothing here knows of connections."""
