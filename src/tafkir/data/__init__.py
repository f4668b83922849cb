"""From files to batches: problems, their splits and variants, the tokenizer, the chat format, packed documents."""
