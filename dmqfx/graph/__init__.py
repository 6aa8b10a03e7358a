"""The graph side: programs, addresses, the table, patterns, the Rewriter, the pipeline."""
