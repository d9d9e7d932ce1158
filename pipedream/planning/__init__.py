"""Where to cut a network: profiles, clock, search, replicas."""
