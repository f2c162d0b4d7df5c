"""What every command shares: settings, files, the run's folder, one clear message."""
