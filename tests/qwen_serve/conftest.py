"""The tests of the server, where what it needs is installed."""

from importlib.util import find_spec

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "openai", "anthropic", "llguidance", "jsonschema")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]
