"""Anthropic's interface, by way of OpenAI's: requests are translated, answers are told in Anthropic's words."""
