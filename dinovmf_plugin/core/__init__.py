"""The paper's mathematics: normalizer, prototypes, centering, heads, masks, schedules; knows no framework."""
