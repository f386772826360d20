"""The HTTP API: thin views over the pipeline and the streams."""
