"""Everything before the first step: flags, tokenizer, base model and adapter, with their checks."""
