"""What the HTTP API promises, as an OpenAPI document.

Each module beside `document` describes one part of the API: a table of its operations, and models of its answers.
What is sent is described by the models that read it, so that only answers are written down here a second time; the
tests hold every answer against its model, and the table against the application's routes.
"""
