"""Training around the methods: config, checkpoints, monitor, alarms, seeding, optimization."""
