"""Methods that drop tokens before the LLM, one file each."""
