"""Models of what the API answers with, for the document and for the tests that hold answers against them."""
