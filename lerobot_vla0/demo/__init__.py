"""A policy from nothing on a CPU: scripted expert, recorder, small random VLM, loss curve."""
