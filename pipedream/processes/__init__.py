"""Real processes: engine, launch, and other ways to train on several GPUs."""
