"""What comes before the first step: flags, tokenizer, base model and adapter, and every check of them."""
