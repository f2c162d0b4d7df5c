"""``make demo``: pre-train on real photographs, evaluate, and show what happened on one page."""
