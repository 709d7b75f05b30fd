"""Tasks, tokenizer, demonstrations: what is learned."""
