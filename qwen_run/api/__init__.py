"""What programs import: LLM, AsyncLLM, QwenForCausalLM."""
