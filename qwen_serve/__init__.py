"""An HTTP server over one engine, with the interfaces of OpenAI's: ``qwen-serve``."""
