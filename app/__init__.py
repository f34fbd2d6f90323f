"""The service: HTTP, SQL, storage, queue. No torch, by any import chain."""
