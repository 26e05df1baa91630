"""What the verbs show to people: rich is loaded here, so a call with --json does without it."""
