"""The paper's comparisons as one command: many runs, each trained and evaluated once, one table."""
