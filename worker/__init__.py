"""The worker: launches and watches the engine; never imports torch outside worker.engine."""
