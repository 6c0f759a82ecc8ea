"""A parameter server among processes: its shards, its workers' stores, who is alive, its log."""
