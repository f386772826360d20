"""Running a whole gateway on one machine."""
