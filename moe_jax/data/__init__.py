"""Text, tokens and batches: `corpus.load_corpus` makes a corpus, `pipeline` cuts it into batches of packed rows."""
