"""Methods that make new tokens before the LLM, one file each."""
