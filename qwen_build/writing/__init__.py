"""The files of an engine, written whole or not at all."""
