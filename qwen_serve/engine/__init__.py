"""The engine behind the server: who is let in, one request on its way, figures of all."""
