"""The request language: pure pydantic, JSON types only. Both the service and the engine speak it."""
