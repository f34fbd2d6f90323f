"""Where an engine process runs: bubblewrap, or namespaces made here, or nothing; what works is tried, not assumed."""
