"""`flask requests`: an operator's look at requests of all organizations, and another try for a dead one.

`cli` has the commands, `reading` what they ask the database, `retrying` how a dead request is sent again.
"""
