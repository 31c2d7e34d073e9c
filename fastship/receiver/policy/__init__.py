"""What is decided from a request's line and fields, who asks and what is under way, before one byte of its body.

Pure but for the two files that `access` reads again. Imported by everything in the receiver, imports nothing of it.
"""
